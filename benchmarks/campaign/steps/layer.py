"""One layer of Llama-3-8B and Llama-2-7B, dense and with a third of the tokens: eager, captured, and dense compiled."""

import torch

from benchmarks.campaign import kernels
from benchmarks.campaign.measure import Context, measure, warm
from benchmarks.campaign.sizes import LLAMA_3, cut_of
from benchmarks.campaign.steps import layers
from benchmarks.campaign.steps.backends import one_backend
from benchmarks.campaign.summary import OURS
from orthorank.stack.flops import Dimensions, layer_cost
from orthorank_kernels import keep_count

DENSE, COMPILED = "transformers", "transformers, compiled"


def run(context: Context) -> None:
    warm(context.machine, context.sizes.warm, context.sizes.product)
    wanted = []
    for model, config in context.sizes.models.items():
        for shape in context.sizes.layer:
            if (cut := context.cut(model, *cut_of(*shape))) is not None:
                fields = {"op": "layer", "shape": f"{model}, {shape[0]} x {shape[1]}"}
                context.lines.write(status="left out", note=f"late: without {cut}", **fields)
                continue
            names = (DENSE, OURS, *((COMPILED,) if model == LLAMA_3 and shape in context.sizes.compiled else ()))
            wanted += [(model, config, *shape, name) for name in names]
    wanted.sort(key=lambda case: case[-1] == COMPILED)  # last: a compilation takes as long as ten measurements
    context.planned = len(wanted)
    config, made = None, None
    with one_backend(context) as backend:
        for model, needed, batch, tokens, name in wanted:
            if config != needed:
                made, config = layers.made(context, needed), needed
            timed(context, model, layers.layer(context, made, batch, tokens), name, backend)


def timed(context: Context, model: str, layer: layers.Layer, name: str, backend: str) -> None:
    """One way to run the layer. The rate is that of the FLOPs it needs; ``flop_ratio``: dense over these."""
    batch, tokens = layer.hidden.shape[:2]
    fields = {"op": "layer", "shape": f"{model}, {batch} x {tokens}", "provider": name}
    if name == OURS and not kernels.usual():
        context.lines.write(status="left out", note="every attention kernel is switched off", **fields)
        return
    with context.guard(**fields):
        sizes = Dimensions.of(layer.model.config)
        updated = keep_count(tokens, layers.KEEP_RATIO) if name == OURS else tokens
        amount = batch * sizes.layer(layers.INDEX, tokens, updated)
        ratio = 1 / layer_cost(layer.model.config, tokens, layers.KEEP_RATIO) if name == OURS else 1.0
        if name == OURS:
            call = (layer.selected, layer.check_selected)
        elif name == DENSE:
            call = (layer.dense, layer.check_dense)
        else:
            compiled = torch.compile(layer.dense, dynamic=False, backend=context.sizes.compiler)
            call = (lambda: compiled(), lambda result: layers.near(result, layer.dense()))
        note = f"dense FLOPs over these: {ratio:.2f}" if name == OURS else f"SDPA {backend}"
        fields |= {"flop_ratio": ratio, "note": note, "backend": "" if name == OURS else backend}
        measure(context, [call], amount=amount, unit="TFLOP/s", **fields)
