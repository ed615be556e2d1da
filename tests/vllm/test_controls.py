"""Prompts that every layer computes, as they are short or ask for it, and whose blocks serve whom."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import (
    PLAN,
    WHOLE_PROMPTS,
    WINDOW,
    Answer,
    answer_of,
    ask,
    check,
    converse,
    engine,
    expect,
    outputs,
    prompts,
    unlike,
)

pytestmark = pytest.mark.vllm
DENSE = PLAN | {"keep_ratio": 1.0}
LEAST = 40
LENGTHS = [20, 90, 39, 150, 40]


def test_short_prompts_beside_long_ones(llama: Path) -> None:
    """Whole prompts in one batch; sinks of first tokens that were not seen before are computed together."""
    plan, asked = PLAN | {"min_prompt": LEAST}, prompts(LENGTHS, seed=2)
    others = [prompts([50 + n], seed=n, first=300 + n)[0] for n in range(4)]
    with engine(llama, plan, **WHOLE_PROMPTS) as llm:
        computed: list[list[int]] = []
        llm.apply_model(lambda model: _note(model.orthorank.bank, computed))
        check(ask(llm, asked), expect(llama, plan, asked))
        check(ask(llm, others), expect(llama, PLAN, others))
    assert computed == [[1], [300, 301, 302, 303]]
    short = [prompt for prompt in asked if len(prompt) < LEAST]
    check(expect(llama, plan, short), expect(llama, DENSE, short))
    unlike(expect(llama, PLAN, short), expect(llama, DENSE, short))


@pytest.mark.parametrize("first", ["dense", "selected"])
def test_blocks_of_dense_and_selected_prompts_are_not_shared(llama: Path, first: str) -> None:
    """In either order, and where the second turn of a chat is of the other kind: hits are what a cold run gives."""
    plan, (text,) = WINDOW | {"min_prompt": LEAST}, prompts([150], seed=3)
    kinds = ["dense", "selected"] if first == "dense" else ["selected", "dense"]
    wanted = {"dense": expect(llama, DENSE, [text])[0], "selected": expect(llama, WINDOW, [text])[0]}
    with engine(llama, plan, max_num_batched_tokens=100) as llm:
        for kind, cached in zip(kinds * 2, (0, 0, 128, 128), strict=True):
            found, hit = _one(llm, text, dense=kind == "dense")
            assert hit == cached, kind
            check([found], [wanted[kind]])
        (several,) = outputs(llm, [text], 6, False, n=2, temperature=1, top_k=1, extra_args={"orthorank_dense": True})
        assert several.num_cached_tokens == 128
        check([answer_of(several, number) for number in range(2)], [wanted["dense"]] * 2)
        turn, _ = _one(llm, text[:30], tokens=40)  # too short to be selected from
        check([turn], expect(llama, DENSE, [text[:30]], tokens=40))
        second = text[:30] + turn.tokens + prompts([30], seed=7)[0][1:]
        found, hit = _one(llm, second)
        assert hit == 0
        check([found], expect(llama, WINDOW, [second]))
        found, hit = _one(llm, second, dense=True)
        assert hit == 64  # a prompt and what was generated after it: every layer computed both
        check([found], expect(llama, DENSE, [second]))


@pytest.mark.parametrize("lengths", [[20, 70], [60, 20]], ids=["short first", "long first"])
def test_each_input_of_a_session_is_judged_by_itself(llama: Path, lengths: list[int]) -> None:
    plan, inputs = WINDOW | {"min_prompt": LEAST}, prompts(lengths, seed=9)
    inputs[1] = [*inputs[1][1:], 5]
    with engine(llama, plan) as llm:
        turns = converse(llm, inputs, 8)
        check(turns, _session(llama, plan, inputs, tokens=8))
    unlike(turns, _session(llama, WINDOW, inputs, tokens=8))


def _session(folder: Path, plan: dict[str, Any], inputs: list[list[int]], tokens: int) -> list[Answer]:
    """The same from transformers with this package's `apply`, call by call.

    But for the sinks: there a cache that begins with a dense prompt has the sinks that dense layers gave it. A server
    has those of the first token, whatever came after it.
    """
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from orthorank import OrthoRankConfig, apply

    model, cache, turns = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), DynamicCache(), []
    alone = DynamicCache()
    with apply(model, OrthoRankConfig(**(plan | {"min_prompt": 0}))) as handle, handle.prefilling(), torch.no_grad():
        model(torch.tensor([inputs[0][:1]]), past_key_values=alone)
    with apply(model, OrthoRankConfig(**plan)) as handle, torch.no_grad():
        for number, ids in enumerate(inputs):
            dense = number and len(ids) < plan.get("min_prompt", 0)  # the first one is judged by the plan
            fed, written, scores = ids, list[int](), list[float]()
            while len(written) < tokens:
                with handle.decoding() if written or dense else handle.prefilling(keep_last=1):
                    found = model(torch.tensor([fed]), past_key_values=cache).logits[0, -1].log_softmax(-1)
                written.append(int(found.argmax()))
                scores.append(float(found.max()))
                fed, cache.orthorank_sinks = written[-1:], dict(alone.orthorank_sinks)
            turns.append(Answer(written, scores, []))
    return turns


def _note(bank: Any, computed: list[list[int]]) -> None:
    compute = bank._compute
    bank._compute = lambda tokens: (computed.append(list(tokens)), compute(tokens))[1]


def _one(llm: Any, prompt: list[int], tokens: int = 6, *, dense: bool = False) -> tuple[Answer, int]:
    """An answer, and how many tokens of the prompt came from the cache."""
    more = {"extra_args": {"orthorank_dense": True}} if dense else {}
    (output,) = outputs(llm, [prompt], tokens, False, **more)
    return answer_of(output), output.num_cached_tokens
