"""Generated tokens that come back inside a prompt: beams, answers that are sent again, streaming-input sessions."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import (
    PLAN,
    WHOLE_PROMPTS,
    WINDOW,
    answer_of,
    ask,
    check,
    converse,
    engine,
    expect,
    greedy_params,
    outputs,
    prompts,
    unlike,
)

pytestmark = pytest.mark.vllm
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"topk": (PLAN, WHOLE_PROMPTS), "window": (WINDOW, {})}
TOKENS = 20


@pytest.mark.parametrize("mode", MODES)
def test_beams_and_answers_sent_again(llama_with_words: Path, mode: str) -> None:
    """What was generated is not selected from, though vLLM takes it for a prompt, whatever its cache holds."""
    from vllm.exceptions import VLLMValidationError

    folder, (plan, others) = llama_with_words, MODES[mode]
    asked = prompts([120, 45], seed=8)
    greedy = expect(folder, plan, asked, tokens=TOKENS)
    with engine(folder, plan, **others, skip_tokenizer_init=False) as llm:
        written = [prompt + answer.tokens for prompt, answer in zip(asked, greedy, strict=True)]
        unlike(ask(llm, [text[:-6] for text in written]), _ends(greedy))  # as prompts of their own they end otherwise
        outputs(llm, [text + text[1:] for text in written], 1, False)  # whose blocks are in the cache, if there is one
        for width in (1, 3):
            found, wanted = _beams(llm, asked, width), _beams_expected(folder, plan, asked, width)
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
            assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=1e-3)
        assert [tokens for tokens, _ in _beams(llm, asked, 1)] == [answer.tokens for answer in greedy]
        resent = _resent(llm, [text[:-6] for text in written], [len(prompt) for prompt in asked])
        assert [answer.tokens for answer in resent] == [answer.tokens[-6:] for answer in greedy]
        for found_, wanted_ in zip(resent, greedy, strict=True):
            assert found_.written == pytest.approx(wanted_.written[-6:], abs=1e-4)
        with pytest.raises(VLLMValidationError, match="orthorank_prompt_tokens is 0; it must be the number"):
            _resent(llm, written, [0, 0])
        check(ask(llm, asked, tokens=TOKENS), greedy)


@pytest.mark.parametrize("reuse", ["prompt", "all"])
def test_a_session_leaves_what_a_cold_run_computes(llama: Path, reuse: str) -> None:
    """Inputs of a session, and another request that begins as its whole text does."""
    first, second = prompts([100], seed=6)[0], prompts([70], seed=7)[0][1:]
    with engine(llama, {"plan": WINDOW, "reuse": reuse}) as llm:
        turns = converse(llm, [first, second], 40)
        check([turns[0]], [answer_of(outputs(llm, [first], 40, False)[0])])
        text = first + turns[0].tokens[:-1] + second
        output = outputs(llm, [text], 6, False)[0]
    wanted, found = expect(llama, WINDOW, [text]), [answer_of(output)]
    if reuse == "prompt":
        assert output.num_cached_tokens == 96  # of the first input alone
        check(found, wanted)
    else:
        assert output.num_cached_tokens > 128
        unlike(found, wanted)


def _ends(answers: list[Any]) -> list[Any]:
    return [answer._replace(tokens=answer.tokens[-6:], written=answer.written[-6:], prompt=[]) for answer in answers]


def _beams(llm: Any, asked: list[list[int]], width: int) -> list[tuple[list[int], float]]:
    """The best beam of each prompt, and its log-probability."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=width, max_tokens=TOKENS, ignore_eos=True)
    best = [output.sequences[0] for output in llm.beam_search([{"prompt_token_ids": ids} for ids in asked], params)]
    return [(list(beam.tokens[len(ids) :]), beam.cum_logprob) for beam, ids in zip(best, asked, strict=True)]


def _beams_expected(folder: Path, plan: Any, asked: list[list[int]], width: int) -> list[tuple[list[int], float]]:
    """The same from transformers with this package's `apply`."""
    import torch
    from transformers import AutoModelForCausalLM

    from orthorank import OrthoRankConfig, apply

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with apply(model, OrthoRankConfig(**plan)):
        for prompt in asked:
            ids = torch.tensor([prompt])
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                num_beams=width,
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_scores=True,
            )
            tokens = written.sequences[0, len(prompt) :]
            scores = model.compute_transition_scores(
                written.sequences, written.scores, getattr(written, "beam_indices", None), normalize_logits=width == 1
            )
            found.append((tokens.tolist(), scores[0].sum().item()))
    return found


def _resent(llm: Any, texts: list[list[int]], own: list[int]) -> list[Any]:
    """Prompts that end with the beginning of an answer, of which so many tokens are their own."""
    params = [greedy_params(6, extra_args={"orthorank_prompt_tokens": count}) for count in own]
    given = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    return [answer_of(output) for output in given]
