"""torch.compile around a patched model of four layers: how long it compiles, and a forward's time beside eager."""

import time

import torch

from benchmarks.campaign.measure import Context, measure, warm
from benchmarks.campaign.sizes import LLAMA_3
from benchmarks.campaign.steps.backends import one_backend
from benchmarks.campaign.steps.layers import near
from orthorank import OrthoRankConfig, apply
from orthorank.speed.random_weights import random_model
from orthorank.stack.flops import plan_flops

LAYERS = 4


def run(context: Context) -> None:
    machine, sizes = context.machine, context.sizes
    warm(machine, sizes.warm, sizes.product)
    model = random_model(sizes.models[LLAMA_3], device=machine.device, dtype=machine.dtype, layers=LAYERS)
    batch, tokens = sizes.smoke
    prompt = torch.arange(batch * tokens, device=machine.device).view(batch, tokens) % model.config.vocab_size
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
    amount = batch * plan_flops(model.config, tokens, plan)
    context.planned = len(sizes.modes) + 1

    def forward() -> torch.Tensor:
        return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits

    fields = {"op": "prefill of 4 layers", "shape": f"{LLAMA_3}, {batch} x {tokens}"}
    with apply(model, plan), one_backend(context) as fields["backend"]:
        eager = forward()
        measure(context, [(forward, lambda result: near(result, eager))], amount=amount, unit="TFLOP/s",
                provider="eager", **fields)  # fmt: skip
        for mode in sizes.modes:
            torch.compiler.reset()
            how = {"mode": mode} if sizes.compiler == "inductor" else {"backend": sizes.compiler}
            fields["provider"] = f"torch.compile, {mode}"
            with context.guard(**fields):
                compiled = torch.compile(forward, **how)
                began = time.monotonic()
                near(compiled(), eager)
                fields["note"] = f"compiled in {time.monotonic() - began:.1f} s"
                timed = (compiled, lambda result: near(result, eager))
                measure(context, [timed], amount=amount, unit="TFLOP/s", modes=("eager",), **fields)
