"""The dense model and plans side by side: their answers, how far apart their next tokens are, and paired losses.

A prompt is answered greedily by the dense model and with each plan. Then the dense model's answer is read by all of
them, each as it generates: the prompt selected, the answer's tokens as generated ones. At each of these tokens the KL
divergence is KL(dense || plan), over the whole vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from orthorank.common.errors import OrthoRankError, check_integer
from orthorank.common.paired import mean_of, rise_of
from orthorank.common.texts import check_ids
from orthorank.config import OrthoRankConfig
from orthorank.evaluation.answer_cache import as_before, owner_of
from orthorank.evaluation.answers import greedy
from orthorank.evaluation.kept import KeptRows
from orthorank.evaluation.prompts import Prompt
from orthorank.families.known import device_of
from orthorank.hf.apply import apply, check_plan, context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnPrompt = Callable[[int, int], None]
Plans = Mapping[str, OrthoRankConfig]


def compare_plans(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Plans,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    bos: str = "auto",
    kept: Path | None = None,
    on_prompt: OnPrompt | None = None,
) -> dict[str, Any]:
    """Answers of the dense model and with each of ``plans`` to ``prompts``, and how far apart they are.

    Args:
        model: without a plan applied, in eval mode; left as it was. tokenizer: the model's.
        plans: by a name for each. prompts: at least one, see `orthorank.evaluation.read_prompts`.
        max_new_tokens: longest answer; decoding is greedy. bos: as for `orthorank.evaluation.answers.with_bos`.
        kept: a JSONL file that gets each prompt's row as soon as it is there. Rows that it holds of the same prompt,
            model, plans and settings are not computed again.
        on_prompt: called after each prompt as ``on_prompt(done, total)``.

    Returns:
        ``prompts``: a row for each, with the answers, and for each plan the KL divergence of the token after the
        prompt (``next_kl``), the mean along the dense answer (``answer_kl``), and the mean loss of its tokens, in nats.
        ``plans``: for each, means and standard errors of these between prompts (``rise``: of the loss, against the
        dense model's, paired), and how many answers are the ``same`` as the dense model's.

    Raises:
        OrthoRankError: no plans or prompts, a plan of another model, a prompt that is empty or too long.

    Example:
        >>> from orthorank.models import load_model
        >>> model, tokenizer, _ = load_model(device="cpu")
        >>> plans = {"pruned": OrthoRankConfig(layers=[14], keep_ratio=0)}
        >>> found = compare_plans(model, tokenizer, plans, [Prompt("The sky is"), Prompt("Two and")], max_new_tokens=4)
        >>> 0 < found["plans"]["pruned"]["next_kl"]["mean"] < 5
        True
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    if not plans:
        raise OrthoRankError("plans is empty; give at least one to compare with the dense model")
    if model.training:
        raise OrthoRankError("model is in training mode; call model.eval() first")
    for plan in plans.values():
        check_plan(model, plan)
    inputs = inputs_of(model, tokenizer, prompts, max_new_tokens, bos)
    settings = {"max_new_tokens": max_new_tokens, "pads": tokenizer.pad_token_id}
    owner: list[Any] = [[name, owner_of(model, plan, False, settings)] for name, plan in plans.items()]
    owners = owner, [[name, as_before(each)] for name, each in owner]
    answered = KeptRows(kept, "answers")
    rows = []
    for number, (prompt, ids) in enumerate(zip(prompts, inputs, strict=True), 1):

        def measure(prompt: Prompt = prompt, ids: list[int] = ids) -> dict[str, Any]:
            return {"prompt": prompt.text, "tokens": len(ids)} | _row(model, tokenizer, plans, ids, max_new_tokens)

        key, before = (_key(ids, each) for each in owners)
        rows.append(answered.get(key, measure, before))
        if on_prompt is not None:
            on_prompt(number, len(inputs))
    return {"prompts": rows, "plans": {name: _summary(name, rows) for name in plans}}


def _key(ids: list[int], owner: list[Any]) -> str:
    return hashlib.sha256(json.dumps([ids, owner]).encode()).hexdigest()[:24]


def inputs_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    bos: str,
) -> list[list[int]]:
    """The prompts in tokens; raises as `compare_plans` does, before anything is computed."""
    if not prompts:
        raise OrthoRankError("prompts is empty; there is nothing to answer")
    longest, entries = _longest(model), model.get_input_embeddings().weight.shape[0]
    inputs = [prompt.ids(tokenizer, bos) for prompt in prompts]
    for number, ids in enumerate(inputs, 1):
        if not ids:
            raise OrthoRankError(f"prompt {number} has no token; give it a word, or let BOS begin it (bos='first')")
        if len(ids) + max_new_tokens > longest:
            raise OrthoRankError(
                f"prompt {number} has {len(ids)} tokens, and with an answer of max_new_tokens {max_new_tokens} that is "
                f"more than the {longest} that the model was made for; shorten it, or lower max_new_tokens"
            )
        if wrong := [token for token in prompts[number - 1].tokens if not 0 <= token < entries]:
            raise OrthoRankError(
                f"prompt {number} has the token id {wrong[0]}, and the model's vocabulary has {entries:,} entries, 0 "
                f"to {entries - 1}; give ids of this model's tokenizer, or the text"
            )
        check_ids(torch.tensor(ids), model)
    return inputs


def that_fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    bos: str = "auto",
) -> list[Prompt]:
    """Those of ``prompts`` that are not too long for the model with an answer. Arguments as of `compare_plans`."""
    most = _longest(model) - max_new_tokens
    return [prompt for prompt in prompts if len(prompt.ids(tokenizer, bos)) <= most]


def _longest(model: "PreTrainedModel") -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def _row(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Plans,
    ids: list[int],
    max_new_tokens: int,
) -> dict[str, Any]:
    prompt = torch.tensor([ids], device=device_of(model))
    answer = greedy(model, tokenizer, prompt, max_new_tokens)
    dense = _log_probabilities(model, prompt, answer)
    row: dict[str, Any] = {"dense": _answer(tokenizer, answer) | {"loss": _loss(dense, answer)}, "plans": {}}
    for name, plan in plans.items():
        with apply(model, plan):
            own = greedy(model, tokenizer, prompt, max_new_tokens)
            with context(model, len(ids)):
                found = _log_probabilities(model, prompt, answer)
        apart = kl_div(found, dense, reduction="none", log_target=True).sum(-1)
        row["plans"][name] = _answer(tokenizer, own) | {
            "same": torch.equal(own, answer),
            "next_kl": float(apart[0]),
            "answer_kl": float(apart.mean()),
            "loss": _loss(found, answer),
        }
    return row


@torch.inference_mode()
def _log_probabilities(model: "PreTrainedModel", prompt: Tensor, answer: Tensor) -> Tensor:
    """Of each token of ``answer`` and all that might have stood there, float64 ``[answer, vocabulary]``."""
    ids = torch.cat([prompt, answer[None, :-1]], dim=1)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0]
    return logits.double().log_softmax(-1)


def _loss(log_probabilities: Tensor, answer: Tensor) -> float:
    return -float(log_probabilities.gather(1, answer[:, None]).mean())


def _answer(tokenizer: "PreTrainedTokenizerBase", answer: Tensor) -> dict[str, Any]:
    return {"answer": tokenizer.decode(answer, skip_special_tokens=True), "tokens": len(answer)}


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    own = [row["plans"][name] for row in rows]
    figures: dict[str, Any] = {}
    for figure in ("next_kl", "answer_kl"):
        mean, error = mean_of([each[figure] for each in own])
        figures[figure] = {"mean": mean, "standard_error": error}
    rise = rise_of([row["dense"]["loss"] for row in rows], [each["loss"] for each in own])
    return figures | {"rise": rise, "same": sum(each["same"] for each in own)}
