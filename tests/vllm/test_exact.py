"""An engine answers what the Hugging Face path answers: whole prompts, prompts and generated tokens in one batch."""

from pathlib import Path

import pytest

from tests.vllm.engines import PLAN, WHOLE_PROMPTS, ask, check, engine, expect, prompts, unlike

pytestmark = pytest.mark.vllm
WAYS = [{"criterion": "inverse"}, {"criterion": "cosine"}, {"keep_last": 4}, {"keep_last": 0}]
LENGTHS = [7, 30, 64, 200, 333]  # one more than the engine runs at once: prompts and generated tokens share steps


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_prompts_and_generated_tokens_in_one_batch(checkpoints: dict[str, Path], model_type: str) -> None:
    folder, asked = checkpoints[model_type], prompts(LENGTHS)
    with engine(folder, PLAN, **WHOLE_PROMPTS) as llm:
        found = ask(llm, asked)
    check(found, expect(folder, PLAN, asked))
    unlike(found, expect(folder, PLAN | {"keep_ratio": 1.0}, asked))


def test_keep_ratio_1_is_dense(llama: Path) -> None:
    asked = prompts([40, 120])
    with engine(llama, PLAN | {"keep_ratio": 1.0}) as llm:
        found = ask(llm, asked)
    check(found, expect(llama, PLAN | {"keep_ratio": 1.0}, asked))


def test_removed_layers_and_ratios_of_their_own(llama: Path) -> None:
    plan = {"layers": [1, 2, 3], "keep_ratio": 0.5, "keep_ratios": {"1": 0.0, "3": 0.25}}
    asked = prompts([5, 90, 160])
    with engine(llama, plan, **WHOLE_PROMPTS) as llm:
        check(ask(llm, asked), expect(llama, plan, asked))


@pytest.mark.parametrize("plan", WAYS, ids=str)
def test_other_ways_to_rank(llama: Path, plan: dict[str, object]) -> None:
    asked = prompts([9, 150])
    with engine(llama, PLAN | plan, **WHOLE_PROMPTS) as llm:
        check(ask(llm, asked), expect(llama, PLAN | plan, asked))


def test_prompts_that_begin_differently(llama: Path) -> None:
    """A bank of sinks by first token, which fills and makes room."""
    asked = [prompts([50 + n], seed=n, first=3 + n)[0] for n in range(9)]
    with engine(llama, PLAN, **WHOLE_PROMPTS) as llm:
        llm.apply_model(lambda model: setattr(model.orthorank.bank, "_capacity", 4))
        check(ask(llm, asked), expect(llama, PLAN, asked))
        check(ask(llm, asked[::-1]), expect(llama, PLAN, asked[::-1]))


def test_preempted_requests(llama: Path) -> None:
    """Blocks for two requests and a half: one is thrown out while it generates, and computed again."""
    asked = prompts([150, 160, 170])
    with engine(llama, PLAN, **WHOLE_PROMPTS, num_gpu_blocks_override=17) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        thrown_out, preempt = [], scheduler._preempt_request
        scheduler._preempt_request = lambda *args, **named: (thrown_out.append(args), preempt(*args, **named))[1]
        found = ask(llm, asked, tokens=40)
        assert thrown_out
    check(found, expect(llama, PLAN, asked, tokens=40))


def test_smollm2_writes_the_same_text(smollm2: Path) -> None:
    """Greedy text of a real model, in float32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    plan = {"layers": [12, 14, 16, 20, 24], "keep_ratio": 1 / 3, "keep_last": 1}
    texts = [
        "The lighthouse keeper wrote in his diary that the storm of 1911 was the worst he had seen, and that ",
        "Gravity is the force by which a planet or other body draws objects toward its center. " * 6,
    ]
    asked = [tokenizer(text)["input_ids"] for text in texts]
    with engine(smollm2, plan, **WHOLE_PROMPTS) as llm:
        check(ask(llm, asked, tokens=24), expect(smollm2, plan, asked, tokens=24))
