"""Criteria and ablations in compiled graphs and under gradients, and all of them combined at random."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank import OrthoRankConfig, apply
from tests.orthorank import statement
from tests.orthorank.hf.test_criteria import ALL, count
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import plain
from tests.orthorank.statement import assert_close


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "row", ["random, sink updated, keys of the selected", pytest.param("prenorm, sinks", marks=pytest.mark.slow)]
)
def test_compiles_without_a_break_and_once_for_any_length(tiny_model: Any, row: str, fresh_compiler: None) -> None:
    """The second length is compiled for all others, the third is not."""
    model, graphs = tiny_model("mistral", num_hidden_layers=2, sliding_window=9), 0

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with apply(model, OrthoRankConfig(layers=[1], **ALL[row])), torch.no_grad():
        for tokens in (24, 17, 31):
            ids, mask = ids_of(2, tokens), torch.ones(2, tokens, dtype=torch.long)
            mask[0, : tokens // 3] = 0
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)
    assert graphs == 2


@pytest.mark.parametrize("row", ["random", "pre-norm", "keys of the selected", "sink updated"])
def test_gradients_are_those_of_the_selected_tokens(tiny_model: Any, row: str) -> None:
    """Of the keys' weights, by a finite difference in the gradient's own direction."""
    model, ids = tiny_model("llama"), ids_of(1, 12)
    weight = model.model.layers[1].self_attn.k_proj.weight
    with apply(model, OrthoRankConfig(layers=[1], **ALL[row])):
        model(ids, labels=ids).loss.backward()
        direction, values = weight.grad / weight.grad.norm(), []
        for step in (1e-2, -2e-2):  # up by one, then down by two
            with torch.no_grad():
                weight.add_(step * direction)
                values.append(float(model(ids, labels=ids).loss))
    numeric = (values[0] - values[1]) / 2e-2
    assert abs(numeric - float(weight.grad.norm())) < 0.02 * abs(numeric)


def model_with_sinks() -> Any:
    """Mistral with windows of 7 whose tokens 5 to 8 look like sinks to each other."""
    model, generator = plain("mistral", sliding_window=7), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.input_layernorm.weight
            weight.copy_(0.2 + 2 * torch.rand(weight.shape, generator=generator))
        table = model.model.embed_tokens.weight
        table.mul_(0.2 + 2 * torch.rand(len(table), 1, generator=generator))
        table[5:9] = 8 * torch.randn(1, 64, generator=generator) + torch.randn(4, 64, generator=generator) / 2
    return model


MODEL: list[Any] = []  # made once, when it is needed


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A plan, rows of various lengths and, for one of them, where a prompt is cut."""
    options = {
        "criterion": draw(st.sampled_from(["orthogonal", "inverse", "random", "cosine", "prenorm"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "kv": draw(st.sampled_from(["all", "all", "selected"])),
        "update_sink": draw(st.booleans()),
        "sinks": draw(st.sampled_from(["first", "auto"])),
    }
    tokens = st.one_of(st.integers(5, 8), st.integers(3, 127))  # the first are sinks
    rows = draw(st.lists(st.lists(tokens, max_size=24), min_size=1, max_size=4).filter(any))
    return {
        "options": options,
        "layers": draw(st.lists(st.integers(0, 3), min_size=1, unique=True)),
        "ratio": draw(st.sampled_from([0.05, 0.25, 1 / 3, 0.5, 0.9, 0.99])),
        "keep_last": draw(st.integers(0, 4)),
        "rows": rows,
        "side": draw(st.sampled_from(["left", "right"])),
        "cuts": sorted(draw(st.sets(st.integers(1, 23), max_size=3))),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
@torch.no_grad()
def test_any_options_together(case: dict[str, Any]) -> None:
    """Rows in a padded batch, and one prompt in chunks, against the naive statement of each row alone."""
    if not MODEL:
        MODEL.append(model_with_sinks())
    model, options, keep = MODEL[0], case["options"], case["keep_last"]
    layers, ratio, rows = sorted(case["layers"]), case["ratio"], case["rows"]
    handle = apply(model, OrthoRankConfig(layers=layers, keep_ratio=ratio, **options))
    try:
        actual = batched(model, handle, rows, case["side"], keep)
        longest = max(rows, key=len)
        chunks = chunked(model, handle, longest, case["cuts"], keep) if options["kv"] == "all" else None
    finally:
        handle.remove()
    for row, logits in zip(rows, actual, strict=True):
        if row:
            k = count(len(row), ratio, options, keep)
            assert_close(logits, statement.logits(model, torch.tensor([row]), layers, k, keep, **options)[0])
    if chunks is not None:
        logits, sizes = chunks
        counts = []
        for number, size in enumerate(sizes):
            last = keep if number == len(sizes) - 1 else 0
            alone = number > 0 and size == 1  # one token over a filled cache is a generated one: dense
            counts.append((size, 1 if alone else count(size, ratio, options, last, inside=number == 0)))
        expected = statement.logits(model, torch.tensor([longest]), layers, 0, keep, chunks=counts, **options)
        assert_close(logits, expected[0])


def batched(model: Any, handle: Any, rows: list[list[int]], side: str, keep: int) -> list[torch.Tensor]:
    """Logits of the valid tokens of each row."""
    longest = max(map(len, rows))
    spans = [slice(longest - len(row), longest) if side == "left" else slice(0, len(row)) for row in rows]
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], mask[i, span] = torch.tensor(row, dtype=torch.long), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with handle.prefilling(keep_last=keep):
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return [logits[i, span] for i, span in enumerate(spans)]


def chunked(model: Any, handle: Any, row: list[int], cuts: list[int], keep: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of a prompt in chunks over a cache, and the chunks' sizes."""
    cuts = [cut for cut in cuts if cut < len(row)]
    sizes = [end - begin for begin, end in zip([0, *cuts], [*cuts, len(row)], strict=True)]
    cache, found = None, []
    for number, ids in enumerate(torch.tensor([row]).split(sizes, dim=1)):
        with handle.prefilling(keep_last=keep if number == len(sizes) - 1 else 0):
            output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0])
    return torch.cat(found), sizes
