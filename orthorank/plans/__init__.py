"""Plans that come with the package, one JSON file each, made by ``benchmarks/make_default_plan.py``."""

from pathlib import Path
from typing import TYPE_CHECKING

from orthorank.common.errors import OrthoRankError
from orthorank.config import SPARSITY, OrthoRankConfig, hub_id, layer_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["default_plan", "shipped_plans"]

FOLDER = Path(__file__).parent
METHODS = {"orthorank": "", "layer-pruning": "-pruning"}  # the ending of the file's name


def shipped_plans(method: str = "orthorank") -> list[OrthoRankConfig]:
    """All shipped plans of ``method``.

    Args:
        method: ``"orthorank"``, or ``"layer-pruning"`` for the layers that SLEB removes at the same sparsity.

    >>> [(plan.model_id, len(plan.layers)) for plan in shipped_plans()]
    [('HuggingFaceTB/SmolLM2-135M-Instruct', 4), ('HuggingFaceTB/SmolLM2-135M-Instruct', 9)]
    """
    if method not in METHODS:
        raise OrthoRankError(f"method is {method!r}; it may be {' or '.join(map(repr, METHODS))}")
    pruning = method == "layer-pruning"
    files = sorted(file for file in FOLDER.glob("*.json") if file.stem.endswith("-pruning") == pruning)
    return [OrthoRankConfig.from_pretrained(file) for file in files]


def file_of(model: str, method: str, sparsity: float) -> str:
    """The name of a plan's file.

    >>> file_of("smollm2-135m-instruct", "layer-pruning", 0.1)
    'smollm2-135m-instruct-10-pruning.json'
    """
    return f"{model}-{round(100 * sparsity)}{METHODS[method]}.json"


def find_plan(
    model: "PreTrainedModel", method: str = "orthorank", sparsity: float = SPARSITY
) -> OrthoRankConfig | None:
    """The plan shipped for ``model``, or None. Arguments as for `default_plan`."""
    config, here = model.config.get_text_config(), hub_id(model)
    for plan in shipped_plans(method):
        shape = (plan.model_type, plan.num_hidden_layers, plan.hidden_size)
        same_shape = shape == (config.model_type, config.num_hidden_layers, config.hidden_size)
        same_name = here is None or plan.model_id is None or here.lower() == plan.model_id.lower()
        if same_shape and same_name and len(plan.layers) == _layers_for(plan, sparsity):
            return plan
    return None


def default_plan(model: "PreTrainedModel", method: str = "orthorank", sparsity: float = SPARSITY) -> OrthoRankConfig:
    """The plan shipped for ``model``: of the same hub id and shape.

    Args:
        model: a causal LM; one without a hub id (loaded from a folder or a file) is matched by its shape.
        method: as for `shipped_plans`.
        sparsity: nominal; the plan has the number of layers that `orthorank.config.layer_count` says.

    Returns:
        The plan, ready for `orthorank.apply`.

    Raises:
        OrthoRankError: none is shipped; the message lists the models that have one, and at which sparsity.
    """
    if (plan := find_plan(model, method, sparsity)) is not None:
        return plan
    config, here = model.config.get_text_config(), hub_id(model)
    shipped = [f"{plan.model_id} at {100 * plan.nominal_sparsity():.2g} %" for plan in shipped_plans(method)]
    raise OrthoRankError(
        f"no plan is shipped for {here or 'this model'} ({config.model_type}, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}) at a sparsity of {100 * sparsity:g} %; there are plans for: "
        f"{', '.join(shipped) or 'none'}. Find one with: orthorank search"
    )


def default_plans(model: "PreTrainedModel") -> dict[str, OrthoRankConfig]:
    """Layer pruning's and OrthoRank's `default_plan`, by what they are; errors as there."""
    return {"layer pruning": default_plan(model, "layer-pruning"), "orthorank": default_plan(model)}


def _layers_for(plan: OrthoRankConfig, sparsity: float) -> int:
    assert plan.num_hidden_layers is not None  # a shipped plan says which model it is for
    return layer_count(plan.num_hidden_layers, sparsity, plan.keep_ratio)
