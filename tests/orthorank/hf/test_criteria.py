"""Every criterion and ablation against a statement of it that shares no code with it; all rows of Table 3."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.calls.context import ForwardContext
from orthorank.hf.criteria import SINK_COSINE, norm_and_select
from orthorank.stack.layers import LayerStack
from tests.orthorank import statement
from tests.orthorank.hf.test_layer import WINDOWS, ids_of
from tests.orthorank.statement import assert_close

# Rows of Table 3 in its order: criterion and stage, and whose keys and values there are.
TABLE_3: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "inverse": {"criterion": "inverse"},
    "pre-norm": {"criterion": "prenorm"},
    "keys of the selected": {"kv": "selected"},
    "full method": {},
}
FURTHER: dict[str, dict[str, Any]] = {
    "cosine": {"criterion": "cosine"},
    "another seed": {"criterion": "random", "seed": 2**40 + 1},
    "sink updated": {"update_sink": True},
    "sink updated, inverse": {"update_sink": True, "criterion": "inverse"},
    "random, sink updated, keys of the selected": {"update_sink": True, "criterion": "random", "kv": "selected"},
    "prenorm, sinks": {"criterion": "prenorm", "sinks": "auto"},
    "inverse, sinks": {"criterion": "inverse", "sinks": "auto"},
    "random, sinks, sink updated": {"criterion": "random", "sinks": "auto", "update_sink": True, "seed": 5},
}
ALL = TABLE_3 | FURTHER
LAYERS = [1, 2, 3]


def count(tokens: int, ratio: float, options: dict[str, Any], keep_last: int = 0, inside: bool = True) -> int:
    """k under the options of a row of the tables above."""
    return statement.count(tokens, ratio, keep_last, inside, options.get("update_sink", False))


def plan(options: dict[str, Any], ratio: float = 1 / 3) -> OrthoRankConfig:
    return OrthoRankConfig(layers=LAYERS, keep_ratio=ratio, **options)


@pytest.fixture
def uneven_model(tiny_model: Any) -> Any:
    """``tiny_model`` with norms and states that tell the criteria apart: uneven weights, uneven embeddings."""

    def make(family: str, **overrides: Any) -> Any:
        model = tiny_model(family, **overrides)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for layer in model.model.layers:
                weight = layer.input_layernorm.weight
                weight.copy_(0.2 + 2 * torch.rand(weight.shape, generator=generator))
            scale = 0.2 + 2 * torch.rand(len(model.model.embed_tokens.weight), 1, generator=generator)
            model.model.embed_tokens.weight.mul_(scale)
        return model

    return make


@pytest.mark.parametrize("row", [name for name in ALL if name != "another seed"])
@pytest.mark.parametrize("windowed", [False, True])
def test_matches_the_naive_statement(uneven_model: Any, family: str, windowed: bool, row: str) -> None:
    model = uneven_model(family, **(WINDOWS[family] if windowed else {"sliding_window": None}))
    options = ALL[row]
    for tokens in (1, 2, 3, 33):
        ids = ids_of(1, tokens, seed=tokens)
        expected = statement.logits(model, ids, LAYERS, k=count(tokens, 1 / 3, options), **options)
        with apply(model, plan(options)), torch.no_grad():
            assert_close(model(ids, use_cache=False).logits, expected)
            assert_close(model(ids).logits, expected)


def test_each_option_matters(uneven_model: Any) -> None:
    """None is read as another one: all logits differ."""
    model, ids = uneven_model("llama"), ids_of(1, 33)
    found = []
    for options in ALL.values():
        if options.get("sinks") == "auto":
            continue  # a random model has no further sinks; see below
        with apply(model, plan(options)), torch.no_grad():
            found.append(model(ids, use_cache=False).logits)
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one - other).abs().max() > 1e-2 * one.abs().max()


@pytest.mark.parametrize("row", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep_last", [0, 2])
def test_a_row_alone_equals_the_row_in_a_batch(uneven_model: Any, row: str, side: str, keep_last: int) -> None:
    model = uneven_model("mistral", sliding_window=9)
    lengths = (21, 1, 2, 13, 30)
    rows = [ids_of(1, n, seed=n) for n in lengths]
    batch, mask = torch.zeros(5, 30, dtype=torch.long), torch.zeros(5, 30, dtype=torch.long)
    spans = [slice(30 - n, 30) if side == "left" else slice(0, n) for n in lengths]
    for i, (ids, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = ids[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    handle = apply(model, plan(ALL[row], ratio=0.4))
    with handle.prefilling(keep_last=keep_last), torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
        expected = sum(count(n, 0.4, ALL[row], keep_last) for n in lengths)
        assert handle.stats[1].tokens_updated == expected
        for i, (ids, span) in enumerate(zip(rows, spans, strict=True)):
            assert_close(together[i : i + 1, span], model(ids, use_cache=False).logits)
    handle.remove()


@pytest.mark.parametrize(
    "row", [name for name, options in ALL.items() if "kv" not in options and name != "another seed"]
)
@pytest.mark.parametrize("keep_last", [0, 2])
def test_chunks_of_a_prompt(uneven_model: Any, row: str, keep_last: int) -> None:
    """Each chunk selects its own best tokens, by the sink of the whole prompt and by places in the whole row."""
    model, options = uneven_model("llama"), ALL[row]
    ids, lengths = ids_of(1, 40, seed=3), (17, 2, 21)
    chunks = []
    for number, n in enumerate(lengths):
        last = keep_last if number == len(lengths) - 1 else 0
        chunks.append((n, count(n, 0.4, options, last, inside=number == 0)))
    expected = statement.logits(model, ids, LAYERS, k=0, keep_last=keep_last, chunks=chunks, **options)
    handle, cache, found = apply(model, plan(options, ratio=0.4)), None, []
    with torch.no_grad():
        for number, chunk in enumerate(ids.split(lengths, dim=1)):
            with handle.prefilling(keep_last=keep_last if number == len(lengths) - 1 else 0):
                output = model(chunk, past_key_values=cache)
            cache = output.past_key_values
            found.append(output.logits)
    handle.remove()
    assert_close(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("row", [name for name, options in ALL.items() if "kv" not in options])
def test_chunks_of_padded_rows(uneven_model: Any, row: str) -> None:
    """Rows that begin in the first chunk, in the second and in the third are each as they are alone."""
    model, lengths, pads = uneven_model("llama"), (8, 8, 14), (0, 3, 11, 20)
    rows = [ids_of(1, 30 - pad, seed=pad) for pad in pads]
    batch = torch.cat([torch.nn.functional.pad(ids, (pad, 0)) for ids, pad in zip(rows, pads, strict=True)])
    mask = (torch.arange(30)[None] >= torch.tensor(pads)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    handle = apply(model, plan(ALL[row], ratio=0.4))

    def chunked(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        cache, found, end = None, [], 0
        for size in sizes:
            begin, end = end, end + size
            output = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            )
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, dim=1)

    with torch.no_grad():
        together = chunked(batch, mask, positions, list(lengths))
        for i, (ids, pad) in enumerate(zip(rows, pads, strict=True)):
            sizes, at = [], 0
            for length in lengths:
                at += length
                if at > pad:
                    sizes.append(min(length, at - pad))
            ones = torch.ones_like(ids)
            alone = chunked(ids, ones, ones.cumsum(1) - 1, sizes)
            assert_close(together[i : i + 1, pad:], alone)
    handle.remove()


def test_keys_of_the_selected_refuse_a_cache(uneven_model: Any) -> None:
    model, ids = uneven_model("llama"), ids_of(1, 12)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with apply(model, plan({"kv": "selected"})) as handle, torch.no_grad():
        with pytest.raises(OrthoRankError, match=r"kv is 'selected' and the call has a cache.*use_cache=False"):
            model(ids, use_cache=True)
        with pytest.raises(OrthoRankError, match="kv is 'selected' and the call has a cache"):
            model.generate(ids, **settings)
        assert handle.stats[1].calls == 0, "refused before any layer ran"
        assert model(ids).past_key_values is None
        with handle.decoding():
            assert model(ids, use_cache=True).past_key_values is not None


def test_generation_without_a_cache_among_the_selected(uneven_model: Any) -> None:
    """The prompt selects, generated tokens are dense and have keys; each step is that of the naive statement."""
    model, prompt = uneven_model("llama"), ids_of(1, 15, seed=8)
    with apply(model, plan({"kv": "selected"})), torch.no_grad():
        tokens = model.generate(
            prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
        )
    for step in range(5):
        ids = tokens[:, : 15 + step]
        k = count(15, 1 / 3, {}, keep_last=1)
        expected = statement.logits(model, ids, LAYERS, k=k + step, keep_last=1 + step, kv="selected")
        assert expected[0, -1].argmax() == tokens[0, 15 + step]


@pytest.mark.parametrize("row", ALL)
def test_the_stack_selects_as_a_plan_does(uneven_model: Any, row: str) -> None:
    """One layer at a time, with padding, is the model with that layer selecting."""
    model, options = uneven_model("llama"), ALL[row]
    ids, mask = ids_of(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[0, :7], mask[2, 19:] = 0, 0
    stack = LayerStack(model)
    for padding in (None, mask):
        inputs = stack.embed(ids, attention_mask=padding)
        h = inputs.hidden_states
        for layer in range(stack.num_layers):
            ratio = 0.4 if layer == 2 else 1.0
            h = stack.run(layer, h, inputs, ratio, **({"criterion": "orthogonal"} | options))
        with apply(model, OrthoRankConfig(layers=[2], keep_ratio=0.4, **options)), torch.no_grad():
            expected = model(ids, attention_mask=padding, use_cache=False).logits
        valid = slice(None) if padding is None else padding.bool()
        assert_close(stack.logits(h)[valid], expected[valid])


def chosen(states: torch.Tensor, k: int, **options: Any) -> list[int]:
    """Positions selected of ``states`` ``[tokens, hidden]``, whose norm changes nothing."""
    states = states[None]
    call = ForwardContext(1, states.shape[1], past=0, prompt_tokens=states.shape[1])
    norm = {"weight": None, "eps": 0.0, "norm": "identity"}
    plan = OrthoRankConfig([0], keep_ratio=k / states.shape[1], **options)
    choice = norm_and_select(plan, 0, call, states, norm, None)
    return choice.positions[0].tolist()


@pytest.mark.parametrize("sinks", ["first", "auto"])
@pytest.mark.parametrize("criterion", ["orthogonal", "inverse", "random", "cosine", "prenorm"])
def test_not_a_number_ranks_last(criterion: str, sinks: str) -> None:
    """Of 6 tokens with the sink at 0 and NaN at 1 and 4, four are selected before the second NaN, and the sink last."""
    states = torch.tensor([[9.0, 0], [torch.nan, 1], [1, 5], [-1, 4], [0, torch.nan], [2, 3]])
    assert chosen(states, 3, criterion=criterion, sinks=sinks) == [2, 3, 5]
    assert chosen(states, 4, criterion=criterion, sinks=sinks) == [1, 2, 3, 5]
    assert chosen(states, 5, criterion=criterion, sinks=sinks) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("criterion", ["orthogonal", "inverse", "random", "cosine", "prenorm"])
def test_further_sinks_rank_last_but_before_not_a_number(criterion: str) -> None:
    """Token 2 points where the sink does, token 4 almost; token 5 is NaN."""
    angle = torch.tensor([0.0, 90, 10, 80, 39, torch.nan, 50, 100]).deg2rad()
    states = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.tensor([50.0, 3, 30, 3, 20, 1, 3, 3])[:, None]
    assert torch.cos(angle[4]) > SINK_COSINE > torch.cos(angle[6])
    assert chosen(states, 4, criterion=criterion, sinks="auto") == [1, 3, 6, 7]
    assert chosen(states, 5, criterion=criterion, sinks="auto") == [1, 2, 3, 6, 7]
    assert chosen(states, 6, criterion=criterion, sinks="auto") == [1, 2, 3, 4, 6, 7]
    assert 0 in chosen(states, 3, criterion=criterion, sinks="auto", update_sink=True)
    if criterion == "inverse":
        assert chosen(states, 2, criterion=criterion) == [2, 4], "without the option they come first"


def test_further_sinks_of_smollm2(smollm2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A text that begins with a blank line has a second sink, "\\n" like the first; the option never updates it."""
    model, tokenizer = smollm2
    text = "\n\nThe harbour was quiet before sunrise, and only two boats had left when the wind turned. Maria counted "
    ids = tokenizer(
        text + "the crates again, wrote 48 in her book, and asked for the captain.", return_tensors="pt"
    ).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0, :2]) == ["Ċ", "Ċ"]
    tokens, layers = ids.shape[1], list(range(12, 19))
    stack = LayerStack(model)
    inputs = stack.embed(ids)
    h, others = inputs.hidden_states, []
    for layer in range(layers[-1]):
        if layer in layers:
            normed = stack.normed(layer, h)[0]
            cosines = torch.cosine_similarity(normed, normed[:1], dim=-1)
            assert (cosines >= SINK_COSINE).nonzero().flatten().tolist() == [0, 1]
            others.append(cosines[2:].abs().max().item())
        h = stack.run(layer, h, inputs)
    assert max(others) < SINK_COSINE / 2
    with capsys.disabled():
        print(f"\nsinks at 0 and 1 of {tokens} tokens; the largest |cosine| of the others is {max(others):.2f}")
        for criterion in ("orthogonal", "inverse", "random"):
            with_sinks, without = ({}, {})  # type: dict[int, list[int]], dict[int, list[int]]
            options = {"criterion": criterion, "k": tokens // 3}
            first = statement.logits(model, ids, layers, seen=with_sinks, **options)
            auto = statement.logits(model, ids, layers, seen=without, sinks="auto", **options)
            with torch.no_grad():
                for sinks, expected in (("first", first), ("auto", auto)):
                    with apply(model, OrthoRankConfig(layers, criterion=criterion, sinks=sinks)):
                        assert_close(model(ids, use_cache=False).logits, expected, relative=1e-4)
            updates = sum(1 in selected for selected in with_sinks.values())
            assert not any(1 in selected for selected in without.values())
            print(
                f"{criterion:>10}: the second sink is updated in {updates} of {len(layers)} layers, with auto in none"
            )
            assert updates == (0 if criterion == "orthogonal" else len(layers) if criterion == "inverse" else updates)
            assert (with_sinks != without) == (updates > 0)
