"""The main job: look at the sink, find a plan, measure it against layer pruning, and write down what came out."""

from orthorank.demo.job import run_demo
from orthorank.demo.screen import Screen, SilentScreen
from orthorank.demo.settings import Settings

__all__ = ["Screen", "Settings", "SilentScreen", "run_demo"]
