"""`generate()` with a plan: the prompt is selected, generated tokens are dense, whatever the cache and the strategy."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from orthorank import Handle, OrthoRankConfig, apply
from tests.orthorank.hf.test_layer import WINDOWS, ids_of
from tests.orthorank.statement import assert_close, logits

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def padded(side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = ids_of(3, 19), torch.ones(3, 19, dtype=torch.long)
    for row, pad in ((0, 6), (2, 17)):
        mask[row, :pad] = 0
    return (ids * mask, mask) if side == "left" else (ids.flip(1) * mask.flip(1), mask.flip(1))


@torch.no_grad()
def by_hand(
    model: Any, handle: Handle, ids: torch.Tensor, mask: torch.Tensor, steps: int = 8, chunk: int | None = None
) -> torch.Tensor:
    """Prefill by the plan with keep_last (in chunks: in the last one only), then dense steps over the cache."""
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    starts = range(0, ids.shape[1], chunk or ids.shape[1])
    for start in starts:
        part = slice(start, start + (chunk or ids.shape[1]))
        with handle.prefilling(keep_last=None if start == starts[-1] else 0):
            scores = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=cache,
            ).logits
    for _ in range(steps):
        token = scores[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        with handle.decoding():
            scores = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return ids


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("chunk", [None, 4, 6, 7, 18, 40])
def test_equals_the_loop_written_by_hand(
    tiny_model: Any, family: str, windowed: bool, chunk: int | None, plan: OrthoRankConfig
) -> None:
    model = tiny_model(family, **(WINDOWS[family] if windowed else {}))
    ids, mask = padded()
    with apply(model, plan) as handle:
        expected = by_hand(model, handle, ids, mask, chunk=chunk)
        actual = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "return_dict_in_generate": True},
    ],
    ids=["static cache", "no cache", "prompt lookup", "dict"],
)
def test_every_way_gives_the_greedy_tokens(
    tiny_model: Any, family: str, windowed: bool, settings: dict[str, Any], plan: OrthoRankConfig
) -> None:
    model = tiny_model(family, **(WINDOWS[family] if windowed else {}))
    ids, mask = padded()
    if "prompt_lookup_num_tokens" in settings:  # takes one row; its first call holds prompt and candidates
        ids, mask = ids[1:2], mask[1:2]
    with apply(model, plan):
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        actual = model.generate(ids, attention_mask=mask, **GREEDY, **settings)
    assert torch.equal(getattr(actual, "sequences", actual), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_static_cache_without_padding(tiny_model: Any, family: str, masked: bool, plan: OrthoRankConfig) -> None:
    """`generate()` makes a mask of its own there, in which a window is not to be taken for padding."""
    model, ids = tiny_model(family, **WINDOWS[family]), ids_of(2, 17)
    given = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with apply(model, plan):
        expected = model.generate(ids, **GREEDY, **given)
        assert torch.equal(model.generate(ids, **GREEDY, **given, cache_implementation="static"), expected)


def test_candidates_in_the_prompts_call_are_dense(tiny_model: Any, plan: OrthoRankConfig) -> None:
    """Prompt lookup finds candidates at once when the prompt repeats itself; greedy tokens stay the same."""
    model = tiny_model("llama")
    ids = ids_of(1, 6).repeat(1, 4)
    with apply(model, plan) as handle:
        expected = model.generate(ids, **GREEDY)
        before = handle.stats[1].calls
        actual = model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY)
        assert handle.stats[1].calls - before <= 8
    assert torch.equal(actual, expected)


def test_a_call_with_prompt_and_decode_tokens(tiny_model: Any, family: str, plan: OrthoRankConfig) -> None:
    """Selected prompt tokens and all later ones, as if the prompt had come in a call of its own."""
    model = tiny_model(family)
    ids, mask = padded()
    more = ids_of(3, 5, seed=9)
    both, both_mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    positions = (both_mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, plan) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config)
        with handle.prefilling():
            model(ids, attention_mask=mask, position_ids=positions[:, :19], past_key_values=cache)
        with handle.decoding():
            expected = model(
                more, attention_mask=both_mask, position_ids=positions[:, 19:], past_key_values=cache
            ).logits
        from orthorank.calls.reading import Phase, phase_of

        with phase_of(handle, Phase(prompt=19, keep_last=1)):
            actual = model(both, attention_mask=both_mask, position_ids=positions).logits[:, 19:]
    assert_close(actual, expected)


def test_beams_samples_and_embeddings(tiny_model: Any, family: str, plan: OrthoRankConfig) -> None:
    model = tiny_model(family)
    ids, mask = padded()
    with apply(model, plan):
        greedy = model.generate(ids, attention_mask=mask, **GREEDY)
        embeds = model.get_input_embeddings()(ids)
        from_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
        assert torch.equal(from_embeds, greedy[:, ids.shape[1] :])

        beams = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
        no_cache = model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **GREEDY)
        assert torch.equal(beams, no_cache)

        sampling = GREEDY | {"do_sample": True, "num_return_sequences": 2}
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(model.generate(ids, attention_mask=mask, **sampling))
        assert torch.equal(*runs)
        assert runs[0].shape == (6, 27)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_prompts(tiny_model: Any, family: str, tokens: int, plan: OrthoRankConfig) -> None:
    model = tiny_model(family)
    ids = ids_of(1, tokens)
    mask = torch.ones_like(ids)
    with apply(model, plan) as handle:
        assert torch.equal(model.generate(ids, **GREEDY), by_hand(model, handle, ids, mask))


def test_without_a_prompt(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    with apply(model, plan):
        assert model.generate(**GREEDY).shape == (1, 9)


def test_keep_last_zero_leaves_the_last_token_to_its_score(tiny_model: Any, plan: OrthoRankConfig) -> None:
    """keep_last matters: the plan with 0 and the plan with 1 update other tokens for some prompt."""
    model = tiny_model("llama")
    differs = 0
    for seed in range(6):
        results = []
        for keep in (0, 1):
            with apply(model, plan) as handle, handle.prefilling(keep_last=keep), torch.no_grad():
                results.append(model(ids_of(1, 20, seed)).logits)
        differs += not torch.equal(*results)
    assert differs > 0


@pytest.mark.parametrize("chunk", [1, 5, 6, 18, 19, 64])
def test_the_last_prompt_token_is_always_updated(tiny_model: Any, family: str, chunk: int) -> None:
    """Also where it is alone in its chunk, and the sink in another one."""
    model = tiny_model(family)
    ids, mask = padded()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=0.05)):
        model.model.layers[1].register_forward_hook(lambda m, a, out: seen.append((a[0][:, -1], out[:, -1])))
        model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **(GREEDY | {"max_new_tokens": 1}))
    before, after = seen[-1]
    assert (before != after).any(dim=-1).tolist() == [True, True, True]


def test_the_prompt_of_generate_is_selected_as_stated(tiny_model: Any, family: str, plan: OrthoRankConfig) -> None:
    """The first token's logits against the statement that shares no code with the package."""
    model = tiny_model(family)
    for tokens in (1, 2, 7, 30):
        ids = ids_of(1, tokens, seed=tokens)
        k = min(tokens - 1, max(tokens // 3, 1))
        found = None if plan.correction is None else plan.correction.maps
        expected = logits(model, ids, [1, 2], k=k, keep_last=1, maps=found)[:, -1]
        with apply(model, plan):
            out = model.generate(
                ids, output_logits=True, return_dict_in_generate=True, **(GREEDY | {"max_new_tokens": 1})
            )
        assert_close(out.logits[0], expected)


def test_a_mask_longer_than_the_prompt(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 13)
    with apply(model, plan):
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones(1, 20, dtype=torch.long), **GREEDY), expected)


def test_a_keep_last_beyond_the_prompt_updates_all_but_the_sink(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = ids_of(2, 12)
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=1 / 3, keep_last=2**20)) as handle:
        model.generate(ids, **GREEDY | {"max_new_tokens": 1})
    assert (handle.stats[1].tokens_in, handle.stats[1].tokens_updated) == (24, 22)


def test_generate_on_smollm2(smollm2: Any) -> None:
    model, tokenizer = smollm2
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # transformers 5.16 reads none from a GGUF
    texts = ["Water boils at a hundred degrees Celsius. " * 4, "The capital of France is"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    plan = OrthoRankConfig(layers=list(range(14, 20)), keep_ratio=1 / 3)
    with apply(model, plan) as handle:
        settings = GREEDY | {"max_new_tokens": 6}
        together = model.generate(**batch, **settings)
        for i, text in enumerate(texts):
            one = tokenizer(text, return_tensors="pt")
            alone = model.generate(**one, **settings)[0, one.input_ids.shape[1] :]
            assert torch.equal(together[i, batch.input_ids.shape[1] :], alone)
        hand = by_hand(model, handle, batch.input_ids, batch.attention_mask, steps=6)
        assert torch.equal(together, hand)
