"""Prefill of whole models with random weights: dense, layer pruning and OrthoRank at 10 and 20 %, interleaved.

This is the paper's throughput. Rounds are the outer loop, so that a run that is cut short has every shape and variant.
Quality is not measured: the weights are random and the layers are not searched.
"""

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.campaign import kernels
from benchmarks.campaign.measure import Context, warm
from benchmarks.campaign.sizes import cut_of
from benchmarks.campaign.steps.backends import one_backend
from orthorank import OrthoRankConfig, apply
from orthorank.evaluation import plan_speedup
from orthorank.speed.random_weights import random_model, unsearched_plans

Variants = Mapping[str, OrthoRankConfig | None]


def run(context: Context) -> None:
    warm(context.machine, context.sizes.warm, context.sizes.product)
    wanted = []
    for name, config in context.sizes.models.items():
        if context.cut(name) is not None:
            context.lines.write(status="left out", model=name, note=f"late: without {name}")
        else:
            wanted.append((name, config))
    for number, (name, config) in enumerate(wanted):
        end = context.left() * (1 - 1 / (len(wanted) - number))  # what has to be left for the models after this one
        with context.guard(model=name), one_backend(context) as backend:
            whole(context, name, config, end, backend)


def whole(context: Context, name: str, config: str, end: float, backend: str) -> None:
    """One model, round after round while there is time. ``backend``: of SDPA in dense layers."""
    machine, sizes = context.machine, context.sizes
    model = random_model(config, device=machine.device, dtype=machine.dtype, layers=sizes.layers)
    variants = variants_of(context, model)
    shapes = []
    for shape in sizes.prefill:
        if (cut := context.cut(*cut_of(*shape))) is None:
            shapes.append(shape)
        else:
            context.lines.write(status="left out", model=name, shape=f"{shape}", note=f"late: without {cut}")
    took: dict[Any, float] = {}
    for number in itertools.count():
        for shape in shapes:
            order = list(variants)
            for variant in order[number % len(order) :] + order[: number % len(order)]:
                key = (shape, variant)
                if number and context.left() - took.get(key, 0.0) <= end:
                    return
                before = context.left()
                if before > end:
                    turn(context, model, name, shape, variant, variants[variant], number, backend)
                else:
                    context.lines.write(status="left out", model=name, shape=f"{shape}", variant=variant, note="late")
                took[key] = before - context.left()
        if context.job.dry and number:
            return


def variants_of(context: Context, model: Any) -> Variants:
    """Dense first; without an attention kernel layer pruning alone is beside it."""
    plans: dict[str, OrthoRankConfig | None] = {"dense": None, **unsearched_plans(model.config.num_hidden_layers)}
    if kernels.usual():
        return plans
    context.lines.write(status="left out", variant="orthorank", note="every attention kernel is switched off")
    return {name: plan for name, plan in plans.items() if "orthorank" not in name}


def turn(
    context: Context,
    model: Any,
    name: str,
    shape: tuple[int, int],
    variant: str,
    plan: Any,
    number: int,
    backend: str,
    untimed: bool = True,
) -> None:
    """One variant at one shape: an untimed forward, checked, then the timed ones, a line each.

    Without the untimed one the first time has compilations in it, and says so.
    """
    machine, (batch, tokens) = context.machine, shape
    ideal = 1.0 if plan is None else plan_speedup(model.config, tokens, plan)
    fields = {"model": name, "shape": f"{batch} x {tokens}", "variant": variant, "round": number,
              "backend": backend}  # fmt: skip
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(machine.device)

    def forward() -> torch.Tensor:
        return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits

    with context.guard(**fields), nullcontext() if plan is None else apply(model, plan) as handle:
        if untimed:
            assert torch.isfinite(forward()).all(), "logits are not finite"
            if handle is not None:
                check_counts(handle.stats, plan, tokens * batch)
        for _ in range(context.sizes.forwards if tokens < context.sizes.short else 1):
            machine.free()
            seconds = machine.around(forward)
            context.lines.write(
                kind="forward", **fields, seconds=seconds, tokens=batch * tokens, ideal=ideal,
                peak_gb=machine.peak() / 1e9, **({} if untimed else {"note": "the first forward at this length"}),
            )  # fmt: skip


def check_counts(stats: Any, plan: OrthoRankConfig, tokens: int) -> None:
    """Every layer of the plan ran, and updated its share of the tokens."""
    for layer, counts in stats.items():
        share = float(counts.tokens_updated) / tokens
        assert abs(share - plan.ratio(layer)) < 0.05, f"layer {layer} updated {share:.1%} of the tokens"
