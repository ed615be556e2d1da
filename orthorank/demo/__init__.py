"""The main job: look at the sink, find a plan, measure it against layer pruning, and write down what came out."""

from typing import TYPE_CHECKING, Any

from orthorank.common.progress import Screen, SilentScreen
from orthorank.demo.settings import Settings

if TYPE_CHECKING:
    from orthorank.demo.job import run_demo

__all__ = ["Screen", "Settings", "SilentScreen", "run_demo"]


def __getattr__(name: str) -> Any:
    """``run_demo``, imported when first asked for: options are checked before torch is there."""
    if name != "run_demo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orthorank.demo.job import run_demo

    globals()[name] = run_demo
    return run_demo
