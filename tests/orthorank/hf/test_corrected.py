"""A corrected plan against a statement of it: the dense layer on everything, and the map on what it leaves out."""

import copy
import pickle
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from transformers import DynamicCache

from orthorank import OrthoRankConfig, OrthoRankError, apply, context, status
from orthorank.calls.context import ForwardContext
from orthorank.correction import Correction, LayerMap
from orthorank.hf.correction import corrected
from tests.orthorank import statement
from tests.orthorank.models import MODELS, tiny

TOKENS, RANK = 24, 4
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
RATIOS = {0: 0.25, 2: 0.0, 3: 0.5}
REMOVED = {1: 0.0, 2: 0.0}


def maps(layers: list[int], hidden: int = 64, seed: int = 0) -> Correction:
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=draw)

    shapes = ((RANK, hidden), 0.2), ((hidden, RANK), 0.3), ((hidden,), 0.5)
    return Correction({i: LayerMap(*(some(*shape, scale=scale) for shape, scale in shapes)) for i in layers})


def plan_of(ratios: dict[int, float] | None = None, **fields: Any) -> OrthoRankConfig:
    ratios = RATIOS if ratios is None else ratios
    return OrthoRankConfig(
        layers=list(ratios), keep_ratio=0.5, keep_ratios=ratios, correction=maps(list(ratios)), **fields
    )


def ids_of(batch: int = 1, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def stated(
    model: Any, ids: Tensor, plan: OrthoRankConfig, prompt: int | None = None, rule: statement.Rule | None = None
) -> Tensor:
    """Logits of one row. Behind the first ``prompt`` tokens all are dense, except in removed layers.

    ``rule``: which tokens a selecting layer updates; None: the best of the prompt, its last `keep_last` always where
    ``prompt`` says that it is one of `generate()`.
    """

    def hook(layer: int, module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
        h = args[0]
        x = getattr(module, "input_layernorm", torch.nn.Identity())(h)
        tokens = h.shape[1]
        length = tokens if prompt is None else min(prompt, tokens)
        chosen = torch.ones(tokens, dtype=torch.bool)
        ratio = plan.ratio(layer)
        if ratio == 0:
            chosen[:] = False
        else:
            scores = statement.ranks("orthogonal", h[0].detach(), x[0].detach())[:length]
            keep = 0 if prompt is None else plan.keep_last
            count = max(int(ratio * length + 1e-6), keep)
            best = partial(statement.selected_mask, k=count, keep_last=keep)
            chosen[:length] = (best if rule is None else rule)(scores)
        down, up, bias = (part.double() for part in plan.correction.maps[layer])
        added = x.double() @ down.T @ up.T + bias
        other = (h.double() + added).to(h.dtype)
        other = torch.cat([h[:, :1], other[:, 1:]], dim=1)  # the sink
        return torch.where(chosen[None, :, None], output, other)

    hooks = [model.model.layers[i].register_forward_hook(partial(hook, i)) for i in plan.layers]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for one in hooks:
            one.remove()


def stated_tokens(model: Any, ids: Tensor, plan: OrthoRankConfig, rule: statement.Rule | None = None) -> Tensor:
    """Greedy tokens, the whole text computed anew for each."""
    prompt, text = ids.shape[1], ids
    for _ in range(GREEDY["max_new_tokens"]):
        following = stated(model, text, plan, None if rule else prompt, rule)[:, -1:].argmax(-1)
        text = torch.cat([text, following], dim=1)
    return text


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_family_is_the_statement(name: str) -> None:
    model, ids, plan = tiny(name), ids_of(), plan_of()
    expected = stated(model, ids, plan)
    with apply(model, plan):
        statement.assert_close(model(ids, use_cache=False).logits, expected, 2e-5)
        statement.assert_close(model(ids, past_key_values=DynamicCache(config=model.config)).logits, expected, 2e-5)


@torch.no_grad()
def test_maps_of_nothing_are_the_plan_without_them(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of()
    zeros = Correction(dict.fromkeys(RATIOS, LayerMap(torch.zeros(RANK, 64), torch.zeros(64, RANK), torch.zeros(64))))
    bare = OrthoRankConfig(layers=list(RATIOS), keep_ratios=RATIOS)
    with apply(model, bare):
        expected = model(ids).logits
    with apply(model, OrthoRankConfig(layers=list(RATIOS), keep_ratios=RATIOS, correction=zeros)):
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_layers_without_a_map_stay_as_they_are(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of()
    some = OrthoRankConfig(layers=list(RATIOS), keep_ratios=RATIOS, correction=maps([2]))
    zero = LayerMap(torch.zeros(RANK, 64), torch.zeros(64, RANK), torch.zeros(64))
    expected = stated(
        model,
        ids,
        OrthoRankConfig(
            layers=list(RATIOS), keep_ratios=RATIOS, correction=Correction({0: zero, 3: zero} | maps([2]).maps)
        ),
    )
    with apply(model, some):
        statement.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("ratios", "how"),
    [
        *product([REMOVED, {1: 1 / 3, 2: 0.5}, RATIOS], [{}, {"use_cache": False}, {"cache_implementation": "static"}]),
        (REMOVED, {"prefill_chunk_size": 7}),  # top-k selects in each chunk, which is another selection
    ],
)
@torch.no_grad()
def test_generated_tokens(tiny_model: Any, family: str, ratios: dict[int, float], how: dict[str, Any]) -> None:
    """Dense in layers that select; corrected in those that are removed, however the cache is filled."""
    model, ids, plan = tiny_model(family), ids_of(tokens=16), plan_of(ratios)
    expected = stated_tokens(model, ids, plan)
    with apply(model, plan):
        assert torch.equal(model.generate(ids, **GREEDY, **how), expected)


@torch.no_grad()
def test_beams(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(2, 9), plan_of({1: 0.0, 2: 0.5})
    with apply(model, plan):
        with_cache = model.generate(ids, num_beams=3, **GREEDY)
        assert torch.equal(with_cache, model.generate(ids, num_beams=3, use_cache=False, **GREEDY))


TAU = 5.0


def thresholded(**fields: Any) -> OrthoRankConfig:
    ratios = {1: 0.5, 2: 0.0, 3: 0.5}
    return plan_of(ratios, select="threshold", thresholds={1: TAU, 3: TAU}, keep_last=0, **fields)


@torch.no_grad()
def test_thresholds_and_chunks_of_any_length(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(), thresholded(decode="threshold")
    expected = stated(model, ids, plan, rule=statement.below(TAU))
    with apply(model, plan) as handle:
        statement.assert_close(model(ids).logits, expected)
        assert 0.2 < handle.stats[1].achieved_ratio < 0.8
        for lengths in ([1] * TOKENS, [5, 1, 11, 7]):
            cache = DynamicCache(config=model.config)
            found = [model(part, past_key_values=cache).logits for part in ids.split(lengths, dim=1)]
            statement.assert_close(torch.cat(found, dim=1), expected, 2e-5)


@torch.no_grad()
def test_generated_tokens_below_a_threshold_are_corrected(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(tokens=10), thresholded(decode="threshold")
    expected = stated_tokens(model, ids, plan, statement.below(TAU))
    with apply(model, plan):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


@torch.no_grad()
def test_a_threshold_below_which_nothing_is(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of()
    plan = plan_of({1: 0.5}, select="threshold", thresholds={1: -1.0})
    expected = stated(model, ids, plan, rule=lambda scores: torch.zeros(len(scores), dtype=torch.bool))
    with apply(model, plan):
        statement.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_windows(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of()
    plan = plan_of({1: 0.25, 2: 0.0}, select="window", select_window=8)
    expected = stated(model, ids, plan, rule=lambda scores: statement.windows_mask(scores, 8, 0.25))
    with apply(model, plan):
        statement.assert_close(model(ids).logits, expected)
        cache = DynamicCache(config=model.config)
        found = [model(part, past_key_values=cache).logits for part in ids.split(8, dim=1)]
        statement.assert_close(torch.cat(found, dim=1), expected, 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(tiny_model: Any, family: str, side: str) -> None:
    model, plan = tiny_model(family), plan_of()
    ids, lengths = ids_of(3, 20), (20, 9, 1)
    mask = torch.zeros(3, 20, dtype=torch.long)
    padded = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(20 - length, 20) if side == "left" else slice(0, length)
        mask[row, place], padded[row, place] = 1, ids[row, :length]
    with apply(model, plan):
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        alone = [model(ids[row : row + 1, :length]).logits[0] for row, length in enumerate(lengths)]
        told = model.generate(padded, attention_mask=mask, **GREEDY) if side == "left" else None
        tokens = [model.generate(ids[r : r + 1, :n], **GREEDY)[0, n:] for r, n in enumerate(lengths)]
    for row, expected in enumerate(alone):
        statement.assert_close(found[row][mask[row].bool()], expected, 2e-5)
        assert told is None or torch.equal(told[row, 20:], tokens[row])


def test_padding_and_sinks_stay_as_they_are() -> None:
    h, x = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    call = ForwardContext(
        2,
        5,
        0,
        5,
        starts=torch.tensor([2, 0], dtype=torch.int32),
        lengths=torch.tensor([3, 4], dtype=torch.int32),
        sink_positions=torch.tensor([2, 0], dtype=torch.int32),
    )
    x[0, :2], x[1, 4] = torch.nan, torch.nan
    changed = (corrected(h, x, call, maps([0]).maps[0]) != h).any(dim=-1)
    assert changed.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]


@torch.no_grad()
def test_tokens_said_to_be_generated_over_an_empty_cache(tiny_model: Any) -> None:
    """Nothing is ranked, and removed layers still have to know where the sinks are."""
    model, ids, plan = tiny_model("llama"), ids_of(2, 12), plan_of({1: 0.0, 2: 0.5})
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    everything: statement.Rule = lambda scores: torch.ones(len(scores), dtype=torch.bool)  # noqa: E731
    with apply(model, plan) as handle, handle.decoding():
        found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        cache = DynamicCache(config=model.config)
        chunks = []
        for begin, end in ((0, 4), (4, 6), (6, 12)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions, "past_key_values": cache}
            chunks.append(model(ids[:, begin:end], **inputs).logits)
    for row, begin in ((0, 0), (1, 5)):
        expected = stated(model, ids[row : row + 1, begin:], plan, rule=everything)[0]
        statement.assert_close(found[row, begin:], expected, 2e-5)
        statement.assert_close(torch.cat(chunks, dim=1)[row, begin:], expected, 2e-5)


@torch.no_grad()
def test_a_context_and_its_continuation(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(), plan_of()
    expected = stated(model, ids, plan, prompt=15)
    with apply(model, plan), context(model, 15):
        statement.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_and_sums_are_float32(dtype: torch.dtype) -> None:
    """Of the model's dtype are the map and the low-rank states; else nearly always the number next to the exact one."""
    draw = torch.Generator().manual_seed(0)
    h, x = (torch.randn(1, 50, 64, generator=draw).to(dtype) for _ in range(2))
    down, up, bias = (part.to(dtype).double() for part in maps([0]).maps[0])
    exact = (h.double() + (x.double() @ down.T).to(dtype).double() @ up.T + bias)[:, 1:]
    found = corrected(h, x, ForwardContext(1, 50, 0, 50), maps([0]).maps[0])
    assert found.dtype == dtype
    assert (found[:, 1:] == exact.to(dtype)).double().mean() > 0.995


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 0.25), (torch.float16, 0.25), (torch.float64, 0.0)])
@torch.no_grad()
def test_models_of_other_dtypes(tiny_model: Any, dtype: torch.dtype, ratio: float) -> None:
    model, ids, plan = tiny_model("llama").to(dtype), ids_of(), plan_of({3: ratio})
    expected = stated(model, ids, plan)
    with apply(model, plan):
        found = model(ids).logits
    assert found.dtype == dtype
    statement.assert_close(found.double(), expected.double(), 1e-6 if dtype == torch.float64 else 3e-2)


@torch.no_grad()
def test_a_model_converted_with_a_plan_applied(tiny_model: Any) -> None:
    """Its maps are converted from what the plan holds, whatever they were in between."""
    model, ids, plan = tiny_model("llama").half().float(), ids_of(), plan_of()  # which rounds its rotary tables, too
    with apply(model, plan) as handle:
        expected = model(ids).logits
        model.half()(ids)
        assert {layer.map.up.dtype for layer in handle.layers} == {torch.float16}
        assert torch.equal(model.float()(ids).logits, expected)


def test_maps_that_float16_does_not_hold(tiny_model: Any) -> None:
    large = maps([1]).maps[1]
    plan = OrthoRankConfig(layers=[1], correction=Correction({1: large._replace(up=large.up * 1e6)}))
    with pytest.raises(
        OrthoRankError, match="the map of layer 1 holds numbers that float16 does not; run the model in"
    ):
        apply(tiny_model("llama").half(), plan)
    apply(tiny_model("llama"), plan).remove()


@torch.no_grad()
def test_under_autocast(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(), plan_of({2: 0.0, 3: 0.0})
    with apply(model, plan):
        expected = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            statement.assert_close(model(ids).logits.float(), expected, 5e-2)


@torch.no_grad()
def test_copies_pickles_and_undo(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(), plan_of()
    dense = model(ids).logits
    forwards = [layer.forward for layer in model.model.layers]
    handle = apply(model, plan)
    expected = model(ids).logits
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    assert torch.equal(model(ids).logits, dense)
    assert [layer.forward for layer in model.model.layers] == forwards
    for other in (copied, unpickled):
        assert torch.equal(other(ids).logits, expected)
        assert "corrected with maps of rank 4: layers 0, 2, 3" in str(status(other))


@torch.no_grad()
def test_the_plan_of_a_handle_that_was_changed(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of()
    with apply(model, plan_of()) as handle:
        handle.config.correction = maps(list(RATIOS))  # equal, and another object
        model(ids)
        handle.config.correction = maps([0, 3], seed=1)
        with pytest.raises(OrthoRankError, match=r"handle\.config\.correction is Correction"):
            model(ids)


@pytest.mark.parametrize("ratios", [{1: 0.5, 2: 0.0}, {1: 0.0, 2: 0.0}])
@torch.no_grad()
def test_compiled_in_one_graph(tiny_model: Any, ratios: dict[int, float]) -> None:
    torch._dynamo.reset()
    model, plan = tiny_model("llama"), plan_of(ratios)
    with apply(model, plan):
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for tokens in (12, 20):
            ids = ids_of(tokens=tokens)
            statement.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(tiny_model: Any, checkpointing: bool) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    if checkpointing and "__call__" in vars(GradientCheckpointingLayer):  # refused, see test_apply
        return
    plan, ids = plan_of(), ids_of()
    grads = []
    for follows in (False, True):
        model = tiny_model("llama")
        if follows:
            handle = apply(model, plan)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            logits = model(ids, use_cache=False).logits
        else:
            logits = stated(model, ids, plan)
        logits.float().log_softmax(-1)[..., 5].sum().backward()
        grads.append([p.grad for p in model.parameters()])
    handle.remove()
    for expected, found in zip(*grads, strict=True):
        if expected is None or not expected.any():
            assert found is None or not found.any()
        else:
            statement.assert_close(found, expected, 1e-4)


@torch.no_grad()
def test_a_cache_knows_the_maps_that_filled_it(tiny_model: Any) -> None:
    model, ids, plan = tiny_model("llama"), ids_of(), plan_of({2: 0.0})
    cache = DynamicCache(config=model.config)
    with apply(model, plan):
        model(ids, past_key_values=cache)
    others = OrthoRankConfig(layers=[2], keep_ratios={2: 0.0})
    for other in (others, OrthoRankConfig(layers=[2], keep_ratios={2: 0.0}, correction=maps([2], seed=1))):
        with apply(model, other), pytest.raises(OrthoRankError, match=r"by another plan: its correction is"):
            model(ids[:, :1], past_key_values=cache)


def test_maps_of_another_models_size_are_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    plan = OrthoRankConfig(layers=[1], correction=maps([1], hidden=32))
    with pytest.raises(OrthoRankError, match="maps of hidden size 32, and the model's is 64"):
        apply(model, plan)
