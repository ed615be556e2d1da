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
        turn, _ = _one(llm, text[:30], tokens=40)  # too short to be selected from
        check([turn], expect(llama, DENSE, [text[:30]], tokens=40))
        second = text[:30] + turn.tokens + prompts([30], seed=7)[0][1:]
        found, hit = _one(llm, second)
        assert hit == 0
        check([found], expect(llama, WINDOW, [second]))
        found, hit = _one(llm, second, dense=True)
        assert hit == 64  # a prompt and what was generated after it: every layer computed both
        check([found], expect(llama, DENSE, [second]))


def _note(bank: Any, computed: list[list[int]]) -> None:
    compute = bank._compute
    bank._compute = lambda tokens: (computed.append(list(tokens)), compute(tokens))[1]


def _one(llm: Any, prompt: list[int], tokens: int = 6, *, dense: bool = False) -> tuple[Answer, int]:
    """An answer, and how many tokens of the prompt came from the cache."""
    more = {"extra_args": {"orthorank_dense": True}} if dense else {}
    (output,) = outputs(llm, [prompt], tokens, False, **more)
    return answer_of(output), output.num_cached_tokens
