"""A plan that is switched off and on in a running engine, and what becomes of its caches."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import WINDOW, answer_of, ask, check, engine, expect, greedy_params, outputs, prompts, unlike

pytestmark = pytest.mark.vllm


def test_off_and_on_again(llama: Path) -> None:
    """With the prefix cache emptied nothing of the other way is left, not even in requests half computed."""
    asked, others = prompts([150, 60], seed=3), prompts([250, 251], seed=4)
    ways = {on: WINDOW | ({} if on else {"keep_ratio": 1.0}) for on in (True, False)}
    wanted = {on: expect(llama, way, asked) for on, way in ways.items()}
    unlike(wanted[True], wanted[False])
    with engine(llama, WINDOW, max_num_batched_tokens=100) as llm:
        check(ask(llm, asked, log_probabilities=False), wanted[True])
        assert _switch(llm, False) == [{"on": False, "said": ""}]
        stale = outputs(llm, [asked[0]], 6, False)[0]
        assert stale.num_cached_tokens == 128  # why it has to be emptied
        for on, other in zip((False, True), others, strict=True):
            running = _begin(llm, other)
            _switch(llm, on)
            assert llm.reset_prefix_cache(reset_running_requests=True)
            check([_end(llm, running)], expect(llama, ways[on], [other]))
            check(ask(llm, asked, log_probabilities=False), wanted[on])
            assert outputs(llm, [asked[0]], 6, False)[0].num_cached_tokens == 128


def test_a_plan_that_removes_layers_stays(llama: Path) -> None:
    plan = {"layers": [1, 3], "keep_ratio": 1 / 3, "keep_ratios": {"3": 0.0}, "select": "window", "select_window": 32}
    with engine(llama, plan) as llm:
        (found,) = _switch(llm, False)
        assert found["on"], found
        assert "the plan removes layers (3)" in found["said"]
        check(ask(llm, prompts([90])), expect(llama, plan, prompts([90])))


def _switch(llm: Any, on: bool) -> list[dict[str, Any]]:
    return llm.collective_rpc("orthorank_switch", args=(on,))


def _begin(llm: Any, prompt: list[int]) -> str:
    """A request of which one step is computed, and not the whole prompt."""
    identity = llm.llm_engine.add_request("running", {"prompt_token_ids": prompt}, greedy_params(6))
    assert not any(output.finished for output in llm.llm_engine.step())
    return identity


def _end(llm: Any, identity: str) -> Any:
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                return answer_of(output)
    raise AssertionError(f"{identity} did not end")
