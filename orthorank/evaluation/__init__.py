"""Measuring a plan: perplexity, tasks, speed, and the floating-point operations that bound the speed-up."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports
from orthorank.evaluation.perplexity import PerplexityResult, perplexity
from orthorank.speed.timing import SpeedReport, Timing, time_prefill
from orthorank.stack.flops import flop_speedup, layer_cost, plan_flops, plan_speedup, prefill_flops

if TYPE_CHECKING:
    from orthorank.evaluation.compare import compare_plans
    from orthorank.evaluation.prompts import read_prompts
    from orthorank.evaluation.task_scores import evaluate_tasks, task_differences
    from orthorank.speed.bench import run_bench
    from orthorank.speed.bench_vllm import run_vllm_bench
    from orthorank.speed.estimates import estimate

__all__ = [
    "PerplexityResult",
    "SpeedReport",
    "Timing",
    "compare_plans",
    "estimate",
    "evaluate_tasks",
    "flop_speedup",
    "layer_cost",
    "perplexity",
    "plan_flops",
    "plan_speedup",
    "prefill_flops",
    "read_prompts",
    "run_bench",
    "run_vllm_bench",
    "task_differences",
    "time_prefill",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.speed.bench": ("run_bench",),
        "orthorank.speed.bench_vllm": ("run_vllm_bench",),
        "orthorank.evaluation.compare": ("compare_plans",),
        "orthorank.evaluation.prompts": ("read_prompts",),
        "orthorank.speed.estimates": ("estimate",),
        "orthorank.evaluation.task_scores": ("evaluate_tasks", "task_differences"),
    },
)
