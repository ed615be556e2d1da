"""lm-evaluation-harness's cache of answers (``--use_cache``): one file belongs to one model with one plan.

The harness finds an answer by its request alone. A file that the dense model filled would give its scores under a
plan's name, and no layer of the plan would run.
"""

import hashlib
import json
from collections.abc import MutableMapping
from typing import Any

from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.stack.layers import config_fingerprint, model_fingerprint

OWNER = "orthorank"  # no hash of a request, which has 64 characters
RECORDS = ("calibration", "measured", "version", "model_id", "model_revision", "sink_layer")
NEWER = ("config", "ids_sha256", "tokenizer")  # of an owner, which what earlier versions kept does not say
PROBE = "The 3 quick foxes (Füchse, 狐) didn't jump:\n\tfor i in range(1024): pass"


def owner_of(model: Any, plan: OrthoRankConfig | None, context_only: bool, further: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on: the weights, what they compute by, the plan, and how requests become calls."""
    fields = None
    if plan is not None:
        fields = {k: v for k, v in plan.to_dict().items() if k not in RECORDS} | code_of(plan.criterion)
    about = {"model": model.config._name_or_path or model.config.model_type, "weights": model_fingerprint(model)}
    about["config"] = config_fingerprint(model)
    owner = about | {"dtype": str(model.dtype), "plan": fields, "context_only": context_only} | further
    return dict(json.loads(json.dumps(owner)))


def as_before(owner: dict[str, Any]) -> dict[str, Any]:
    """``owner`` as earlier versions wrote it, whose rows go on being found.

    >>> as_before({"weights": "1f", "config": "2e"})
    {'weights': '1f'}
    """
    return {name: value for name, value in owner.items() if name not in NEWER}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary, of how a text is cut, and of the chat template."""
    said = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"], str(tokenizer.chat_template)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def claim(answers: MutableMapping[str, Any], owner: dict[str, Any], file: str) -> None:
    """Note that ``answers``, the mapping in ``file``, are of ``owner``.

    Raises:
        OrthoRankError: they are of another one, or the file does not say of which.
    """
    remedy = "name another file for each model and plan (--use_cache), or delete it"
    found = answers.get(OWNER)
    if found is None:
        if len(answers):
            raise OrthoRankError(
                f"the cache of answers {file} has {len(answers)} answers and does not say of which model and plan they "
                f"are (the harness's own models do not); they would be taken for those of {_said(owner)}; {remedy}"
            )
        answers[OWNER] = owner
        return
    names = [name for name in {**found, **owner} if found.get(name) != owner.get(name)]
    if names := [name for name in names if name in found or name not in NEWER]:
        raise OrthoRankError(
            f"the cache of answers {file} is of {_said(found)}, and this is {_said(owner)}: they differ in "
            f"{', '.join(names)}; {remedy}"
        )


def _said(owner: dict[str, Any]) -> str:
    plan = owner.get("plan")
    if not plan:
        how = "dense"
    else:
        ratios = f", keep_ratios {plan['keep_ratios']}" if plan["keep_ratios"] else ""
        how = f"with a plan (layers {plan['layers']}, keep_ratio {plan['keep_ratio']:.4g}{ratios}, {plan['select']})"
    return f"{owner.get('model')}, {how}{', context_only' if owner.get('context_only') else ''}"
