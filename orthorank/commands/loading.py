"""What commands load: a model, and the plans that are named for it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orthorank.commands.screen import RichScreen

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig
    from orthorank.models import ModelInfo


def read_plans(paths: Sequence[str] | None) -> "dict[str, OrthoRankConfig]":
    """The plans at ``paths``, by a name for each that says what it does."""
    from orthorank.config import OrthoRankConfig
    from orthorank.speed.bench import variant_names

    plans = [OrthoRankConfig.from_pretrained(path) for path in paths or ()]
    return dict(zip(variant_names(plans), plans, strict=True))


def load(
    screen: RichScreen,
    model: str | None,
    device: str,
    dtype: str | None = None,
    plans: "Mapping[str, OrthoRankConfig] | None" = None,
    paths: Sequence[str] | None = None,
    **how: Any,
) -> "tuple[Any, Any, ModelInfo]":
    """`orthorank.models.load_model`, with a bar.

    Args:
        plans: from `read_plans` of ``paths``: they fit the model, else this raises, and the screen says which is which.
    """
    from orthorank.hf.apply import check_plan
    from orthorank.models import load_model, locate

    with screen.progress(f"loading {locate(model).name}", 1):
        loaded, tokenizer, info = load_model(model, device, dtype, **how)
    for plan in (plans or {}).values():
        check_plan(loaded, plan)
    if plans:
        screen.say("Plans: " + ", ".join(f"{name} = {path}" for name, path in zip(plans, paths or (), strict=True)))
    return loaded, tokenizer, info
