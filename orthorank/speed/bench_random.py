"""Prefill of the dense model, of layer pruning and of plans, on random weights: what ``orthorank bench
--random-weights`` measures.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from orthorank.config import OrthoRankConfig
from orthorank.families.known import device_of
from orthorank.speed.bench import BenchSettings, OnStep, random_prompt
from orthorank.speed.bench_results import prefill_fields
from orthorank.speed.memory import memory_meter, peak_bytes
from orthorank.speed.prefill_ways import Ways
from orthorank.speed.timing import time_prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMARK = "The weights are random: this is speed and memory alone, and says nothing about quality."
RULE = "Layers that select are the last ones before the final layer: random weights give a search nothing to find."


def bench_random(
    model: "PreTrainedModel",
    variants: Mapping[str, OrthoRankConfig | None],
    settings: BenchSettings,
    *,
    graph: bool = False,
    compiled: bool = False,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Time one prefill of each variant in turn, and measure the memory that it takes.

    Args:
        model: from `orthorank.speed.random_weights.random_model`, or any other.
        variants: names and plans; None is the dense model. The first one is the baseline.
        settings: of the prompt and the rounds; nothing is decoded and no break-even looked for.
        graph, compiled: as for `time_prefill`.
        on_step: called after each round as ``on_step(what, done, total)``.

    Returns:
        As JSON stores it: a row for each variant (nominal sparsity, speed-up by FLOPs, measured speed-up and times,
        peak memory), the plans, and how it was measured.

    Raises:
        OrthoRankError: no variants, a plan does not fit, or graph on a CPU.
    """
    step = on_step or (lambda what, done, total: None)
    prompt = random_prompt(model, settings.batch_size, settings.prompt_tokens)
    report = time_prefill(
        model,
        variants,
        prompt,
        rounds=settings.rounds,
        warmup=settings.warmup,
        graph=graph,
        compiled=compiled,
        on_round=lambda n, of: step("prefill", n, of),
    )
    device = device_of(model)
    eager = Ways(model, variants, prompt)
    rows = []
    for name, plan in variants.items():
        with eager.running(name) as run, torch.inference_mode():
            peak = peak_bytes(run, device)
        row = prefill_fields(name, plan, model.config, report.timings[name], settings.prompt_tokens)
        rows.append(row | {"peak_bytes": peak})
    return {
        "remark": REMARK,
        "rule": RULE,
        "graph": graph,
        "compiled": compiled,
        "attention": model.config._attn_implementation,
        "memory_meter": memory_meter(device),
        "rows": rows,
        "plans": {name: plan.to_dict() for name, plan in variants.items() if plan is not None},
        "prefill": report.to_dict(),
    }
