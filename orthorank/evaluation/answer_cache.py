"""lm-evaluation-harness's cache of answers (``--use_cache``): one file belongs to one model with one plan.

The harness finds an answer by its request alone. A file that the dense model filled would give its scores under a
plan's name, and no layer of the plan would run.
"""

import json
from collections.abc import MutableMapping
from typing import Any

from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.stack.layers import model_fingerprint

OWNER = "orthorank"  # no hash of a request, which has 64 characters
RECORDS = ("calibration", "measured", "version", "model_id", "model_revision", "sink_layer")


def owner_of(model: Any, plan: OrthoRankConfig | None, context_only: bool, further: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on: the weights, the plan, and how requests become calls."""
    fields = None if plan is None else _fields(plan)
    about = {"model": model.config._name_or_path or model.config.model_type, "weights": model_fingerprint(model)}
    owner = about | {"dtype": str(model.dtype), "plan": fields, "context_only": context_only} | further
    return dict(json.loads(json.dumps(owner)))


def _fields(plan: OrthoRankConfig) -> dict[str, Any]:
    return {k: v for k, v in plan.to_dict().items() if k not in RECORDS} | code_of(plan.criterion)


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
    if found != owner:
        names = [name for name in {**found, **owner} if found.get(name) != owner.get(name)]
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
