"""Windows and thresholds: nothing depends on the schedule, and cached blocks hold what a cold run computes."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import (
    EQUAL,
    PLAN,
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
CHUNKED = {"max_num_batched_tokens": 100, "enable_prefix_caching": False}
LENGTHS = [150, 90, 33, 200, 333]


@pytest.fixture(scope="module")
def threshold(llama: Path) -> dict[str, Any]:
    """A plan that selects by thresholds, calibrated on what the tests ask."""
    import torch
    from transformers import AutoModelForCausalLM

    from orthorank import OrthoRankConfig
    from orthorank.calibration.thresholds import calibrate

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.tensor(prompts([256] * 4, seed=5))
    plan = calibrate(model, ids, OrthoRankConfig(**PLAN))
    return PLAN | {"select": "threshold", "thresholds": {str(layer): tau for layer, tau in plan.thresholds.items()}}


def test_windows_do_not_depend_on_the_schedule(llama: Path) -> None:
    """Steps of 100 tokens, shared by five requests; chunks end at windows of 32."""
    asked = prompts(LENGTHS, seed=9)
    with engine(llama, WINDOW, **CHUNKED) as llm:
        together = ask(llm, asked)
        alone = [ask(llm, [prompt])[0] for prompt in asked[:2]]
    wanted = expect(llama, WINDOW, asked)
    check(together, wanted)
    check(alone, wanted[:2])
    unlike(together, expect(llama, PLAN, asked))


@pytest.mark.parametrize("count", ["read", "capacity"])
def test_thresholds_do_not_depend_on_the_schedule(llama: Path, threshold: dict[str, Any], count: str) -> None:
    """The same without a scheduler of our own, whether or not the host reads how many are selected."""
    asked = prompts(LENGTHS, seed=9)
    with engine(llama, {"plan": threshold, "threshold_count": count}, **CHUNKED) as llm:
        found = ask(llm, asked)
    check(found, expect(llama, threshold, asked))
    unlike(found, expect(llama, PLAN, asked))


@pytest.mark.parametrize("mode", ["window", "threshold"])
def test_a_hit_of_the_prefix_cache_is_a_cold_run(llama: Path, threshold: dict[str, Any], mode: str) -> None:
    """Prompts that share a prefix, one of them the whole of the other, asked one after another."""
    plan = WINDOW if mode == "window" else threshold
    (long,) = prompts([200], seed=3)
    asked = [long, long[:130] + prompts([60], seed=4)[0][1:], long[:128], long]
    with engine(llama, plan, max_num_batched_tokens=100) as llm:
        found, cached = _one_by_one(llm, asked)
    assert all(n > 0 for n in cached[1:]), cached
    check(found, expect(llama, plan, asked))


@pytest.mark.parametrize("mode", ["window", "threshold"])
def test_the_second_turn_of_a_chat(llama: Path, threshold: dict[str, Any], mode: str) -> None:
    """The answer of the first turn is part of the prompt of the second: its blocks are not used again, by default."""
    plan = WINDOW if mode == "window" else threshold
    (first,) = prompts([100], seed=6)
    with engine(llama, plan) as llm:
        ((turn,), _) = _one_by_one(llm, [first], tokens=60)
        second = first + turn.tokens + prompts([30], seed=7)[0][1:]
        found, cached = _one_by_one(llm, [second])
    assert cached == [96], cached  # of the prompt alone, though 160 tokens are known
    check(found, expect(llama, plan, [second]))
    with engine(llama, {"plan": plan, "reuse": "all"}) as llm:
        _one_by_one(llm, [first], tokens=60)
        reused, cached = _one_by_one(llm, [second])
    assert cached[0] >= 128
    difference = reused[0].distance(found[0])
    print(f"\n{mode}: blocks of generated tokens move log-probabilities by up to {difference:.2g}")
    assert difference > EQUAL  # they hold tokens that every layer computed: that is why they are left out


def _one_by_one(llm: Any, asked: list[list[int]], tokens: int = 6) -> tuple[list[Answer], list[int]]:
    """Answers, and how many tokens of each prompt came from the cache."""
    found = [outputs(llm, [prompt], tokens, log_probabilities=False)[0] for prompt in asked]
    return [answer_of(output) for output in found], [output.num_cached_tokens for output in found]
