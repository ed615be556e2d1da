"""What commands load: a model, on which the plans that are named are checked."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orthorank.commands.screen import RichScreen

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig
    from orthorank.models import ModelInfo


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
        plans: from `orthorank.speed.bench.read_plans` of ``paths``: they fit the model, else this raises, and the
            screen says which is which.
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
