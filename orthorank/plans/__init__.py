"""Plans that come with the package, one JSON file each, made by ``benchmarks/make_default_plan.py``."""

from pathlib import Path
from typing import TYPE_CHECKING

from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig, hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["default_plan", "shipped_plans"]

FOLDER = Path(__file__).parent
METHODS = {"orthorank": "", "layer-pruning": "-pruning"}  # the ending of the file's name


def shipped_plans(method: str = "orthorank") -> list[OrthoRankConfig]:
    """All shipped plans of ``method``.

    Args:
        method: ``"orthorank"``, or ``"layer-pruning"`` for the layers that SLEB removes at the same sparsity.

    >>> [plan.model_id for plan in shipped_plans()]
    ['HuggingFaceTB/SmolLM2-135M-Instruct']
    """
    if method not in METHODS:
        raise OrthoRankError(f"method is {method!r}; it may be {' or '.join(map(repr, METHODS))}")
    pruning = method == "layer-pruning"
    files = sorted(file for file in FOLDER.glob("*.json") if file.stem.endswith("-pruning") == pruning)
    return [OrthoRankConfig.from_pretrained(file) for file in files]


def default_plan(model: "PreTrainedModel", method: str = "orthorank") -> OrthoRankConfig:
    """The plan shipped for ``model``: of the same hub id and shape.

    Args:
        model: a causal LM; one without a hub id (loaded from a folder or a file) is matched by its shape.
        method: as for `shipped_plans`.

    Returns:
        The plan, ready for `orthorank.apply`.

    Raises:
        OrthoRankError: none is shipped; the message lists the models that have one.
    """
    config, here = model.config.get_text_config(), hub_id(model)
    for plan in shipped_plans(method):
        shape = (plan.model_type, plan.num_hidden_layers, plan.hidden_size)
        same_shape = shape == (config.model_type, config.num_hidden_layers, config.hidden_size)
        if same_shape and (here is None or plan.model_id is None or here.lower() == plan.model_id.lower()):
            return plan
    known = ", ".join(str(plan.model_id) for plan in shipped_plans(method)) or "none"
    raise OrthoRankError(
        f"no plan is shipped for {here or 'this model'} ({config.model_type}, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}); there are plans for: {known}. Find one with: orthorank demo --plan search"
    )
