"""The main job: look at the sink, find a plan, measure it against layer pruning, and write down what came out."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports
from orthorank.common.progress import Screen, SilentScreen
from orthorank.demo.settings import Settings

if TYPE_CHECKING:
    from orthorank.demo.job import run_demo

__all__ = ["Screen", "Settings", "SilentScreen", "run_demo"]

__getattr__, __dir__ = exports(__name__, {"orthorank.demo.job": ("run_demo",)})
