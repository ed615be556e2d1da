"""Measuring a plan: perplexity, speed, and the floating-point operations that bound the speed-up."""

from orthorank.evaluation.flops import flop_speedup, layer_cost, prefill_flops
from orthorank.evaluation.perplexity import PerplexityResult, perplexity
from orthorank.evaluation.speed import SpeedReport, Timing, time_prefill

__all__ = [
    "PerplexityResult",
    "SpeedReport",
    "Timing",
    "flop_speedup",
    "layer_cost",
    "perplexity",
    "prefill_flops",
    "time_prefill",
]
