"""torch.compile of a model with a plan: no graph break, one compilation for many calls, and counts without waiting."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction
from orthorank.plan_checks import release_of
from orthorank_kernels import checks as _checks
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.statement import assert_close

PLAN = OrthoRankConfig(layers=[1], keep_ratio=1 / 3)
PLANS = {"plain": PLAN, "corrected": dataclasses.replace(PLAN, correction=maps([1]))}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts, and nothing compiled here stays. What Dynamo tells of its work is not kept."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what it is given as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return self  # `generate()` copies its settings

    def written_inputs(self) -> list[str | None]:
        """How Dynamo classes the tensors that the graphs add to: None would forbid CUDA graphs."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes if str(node.target) == "add_"]
        return [node.args[0].meta.get("tensor_dict", {}).get("_dynamo_static_input_type") for node in nodes]

    def called(self) -> set[str]:
        """Names of everything that the graphs call."""
        return {str(node.target).split(".")[-1] for graph in self.graphs for node in graph.graph.nodes}


def left_padded(batch: int, tokens: int) -> torch.Tensor:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, : tokens // 3] = 0
    return mask


@pytest.mark.parametrize("corrected", ["plain", pytest.param("corrected", marks=pytest.mark.slow)])
@torch.no_grad()
def test_ten_calls_compile_once_and_two_lengths_twice(tiny_model: Any, corrected: str) -> None:
    """``fullgraph``: a graph break would be an error. Padding differs from call to call, and its counts are read."""
    model, graphs = tiny_model("llama", num_hidden_layers=2), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with apply(compiled, PLANS[corrected]) as handle:  # what is patched is the model inside
        for pad in range(10):
            ids, mask = ids_of(2, 24, seed=pad), torch.ones(2, 24, dtype=torch.long)
            mask[0, :pad] = 0
            expected = model(ids, attention_mask=mask).logits
            updated = handle.stats[1].tokens_updated
            assert_close(compiled(ids, attention_mask=mask).logits, expected)
            assert handle.stats[1].tokens_updated - updated == (24 - pad) // 3 + 8
        assert len(graphs.graphs) == 1
        assert handle.stats[1].calls == 20
        assert handle.stats[1].tokens_in == 2 * sum(48 - pad for pad in range(10))
        assert graphs.written_inputs() == ["unguarded"], "the counts do not stay where they are"
        assert not graphs.called() & {"item", "tolist", "_local_scalar_dense", "cpu", "nonzero"}, "a call waits"

        for tokens in (17, 19, 31):
            ids, mask = ids_of(2, tokens), left_padded(2, tokens)
            assert_close(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
        assert len(graphs.graphs) == 2, "the second length is compiled for any length"


@pytest.mark.parametrize("corrected", ["plain", pytest.param("corrected", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_model_fills_and_continues_a_cache(tiny_model: Any, corrected: str) -> None:
    """Prompt, generated tokens, and another prompt chunk with the row's sink: as the model that is not compiled."""
    model, graphs = tiny_model("llama", num_hidden_layers=2), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with apply(model, PLANS[corrected]) as handle:
        logits: list[list[torch.Tensor]] = []
        for run in (model, compiled):
            cache, calls = DynamicCache(), [ids_of(2, tokens, seed=tokens) for tokens in (24, 1, 1, 1, 9)]
            logits.append([run(ids, past_key_values=cache).logits for ids in calls])
        for eager, other in zip(*logits, strict=True):
            assert_close(other, eager)
        assert len(graphs.graphs) == 4, "prompt, one token, one token over any length, chunk"
        assert handle.stats[1].tokens_updated == 2 * 2 * (8 + 3 + 3)


@pytest.mark.parametrize(
    "corrected", [None, pytest.param(maps([1]), marks=pytest.mark.slow)], ids=["plain", "corrected"]
)
@pytest.mark.parametrize("ratio", [0.0, 1 / 3])
def test_generate_compiles_its_decode_step_once(tiny_model: Any, ratio: float, corrected: Correction | None) -> None:
    """As `generate()` does by itself on a GPU for static caches; prompts of two lengths share the graph."""
    model, graphs = tiny_model("llama", num_hidden_layers=3), Graphs()
    settings = CompileConfig(backend=graphs, fullgraph=True, mode=None)
    settings._compile_all_devices = True
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=ratio, correction=corrected)) as handle:
        for tokens in (24, 17):
            ids, mask = ids_of(2, tokens), left_padded(2, tokens)
            static: dict[str, Any] = {"cache_implementation": "static", "attention_mask": mask}
            static |= {"max_length": 40, "max_new_tokens": None}
            expected = model.generate(ids, **GREEDY | static | {"max_length": tokens + 6}, disable_compile=True)
            calls = handle.stats[1].calls
            actual = model.generate(ids, compile_config=settings, **GREEDY | static)
            assert torch.equal(actual[:, : tokens + 6], expected)
            assert handle.stats[1].calls - calls == 40 - tokens
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("corrected", PLANS)
@torch.no_grad()
def test_decoding_over_a_static_cache_by_hand(tiny_model: Any, corrected: str) -> None:
    """Its length lies in a tensor, which a graph cannot read: one token is a decode step, several by what is said."""
    several = 3 if release_of(transformers.__version__) >= (5, 20) else 0  # 5.19 compiles it for no model, dense or not
    model, graphs = tiny_model("llama", num_hidden_layers=2), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with apply(model, PLANS[corrected]) as handle:
        logits: list[list[torch.Tensor]] = []
        for run in (model, compiled):
            cache = StaticCache(model.config, max_cache_len=40)
            model(ids_of(2, 12), past_key_values=cache)
            logits.append([run(ids_of(2, 1, seed=i), past_key_values=cache).logits for i in range(4)])
            with handle.decoding():
                logits[-1] += [run(ids_of(2, 3, seed=i), past_key_values=cache).logits for i in range(several)]
    for eager, other in zip(*logits, strict=True):
        assert_close(other, eager)
    assert len(graphs.graphs) == (2 if several else 1)


@pytest.mark.parametrize("corrected", PLANS)
@pytest.mark.slow
def test_a_compiled_training_step(tiny_model: Any, corrected: str) -> None:
    """Gradients of the compiled model are those of the model as it is."""
    gradients = []
    for compiling in (False, True):
        model = tiny_model("llama", num_hidden_layers=2).train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiling else model
        with apply(model, PLANS[corrected]):
            run(ids_of(2, 12), labels=ids_of(2, 12)).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected)


@torch.no_grad()
def test_a_mask_with_holes_stops_a_compiled_model(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids, mask = ids_of(2, 12), left_padded(2, 12)
    mask[1, 5] = 0
    with apply(model, PLAN):
        with pytest.raises(OrthoRankError, match="attention_mask has holes in row 1"):
            model(ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="attention_mask or position_ids are not those of padded rows"):
            torch.compile(model, backend="eager", fullgraph=True)(ids, attention_mask=mask)


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: values of tensors that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_layers_and_counters_wait_for_nothing(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call asks for values of its mask, once for all layers; one more selected layer asks for none.

    Checks that look at values where that is free, on a CPU, do here what they do on a GPU: nothing, and what looks for
    padding without a mask has looked at an earlier call.
    """
    monkeypatch.setattr(_checks, "readable", lambda *values: False)
    model, waits = tiny_model("llama"), Counter[str]()
    ids, mask = ids_of(2, 12), left_padded(2, 12)
    for layers in ([1], [1, 2, 3]):
        for padding in ("padded", "not padded"):
            with apply(model, OrthoRankConfig(layers=layers)) as handle, Waits() as counted:
                handle.unmasked.done = True
                model(ids, attention_mask=mask if padding == "padded" else None)
                waits[f"{len(layers)} {padding}"] = counted.count
            with Waits() as counted:
                assert handle.stats[layers[-1]].calls == 1
                assert handle.stats[layers[-1]].tokens_updated == (2 + 4 if padding == "padded" else 8)
                assert counted.count > 0, "reading is what waits"
    assert waits["1 padded"] == waits["3 padded"]
    assert waits["1 not padded"] == waits["3 not padded"] == 0


CRITERIA: list[dict[str, Any]] = [
    {"criterion": "inverse"},
    {"criterion": "random"},
    {"update_sink": True},
    {"sinks": "auto"},
    {"kv": "selected"},
]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", CRITERIA, ids=str)
def test_every_criterion_is_one_graph_for_any_length(tiny_model: Any, mode: dict[str, Any]) -> None:
    model, graphs = tiny_model("llama", num_hidden_layers=2), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with apply(model, OrthoRankConfig(layers=[1], **mode)) as handle:
        for tokens in (24, 24, 17, 19):
            ids, mask = ids_of(2, tokens), left_padded(2, tokens)
            before = handle.stats[1].tokens_updated
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            updated = handle.stats[1].tokens_updated - before
            assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)
            assert handle.stats[1].tokens_updated - before == 2 * updated > 0
    assert len(graphs.graphs) == 2


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor(tiny_model: Any, family: str, dynamic: bool | None, plan: OrthoRankConfig) -> None:
    """The default backend, for every family: same logits, whole graphs, any length after the second."""
    model = tiny_model(family)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with apply(model, plan) as handle:
        for tokens in (24, 17, 19, 19):
            ids, mask = ids_of(2, tokens), left_padded(2, tokens)
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            calls = handle.stats[2].calls
            actual = compiled(ids, attention_mask=mask, use_cache=False).logits
            assert handle.stats[2].calls == calls + 1
            assert_close(actual[mask.bool()], expected[mask.bool()], relative=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (2 if dynamic is None else 1)
