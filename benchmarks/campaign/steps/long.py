"""A very long prompt, dense and with OrthoRank at 20 %: one forward each, of a model with random weights."""

from benchmarks.campaign.measure import Context
from benchmarks.campaign.sizes import LLAMA_3
from benchmarks.campaign.steps.backends import one_backend
from benchmarks.campaign.steps.prefill import turn, variants_of
from orthorank.speed.random_weights import random_model

VARIANTS = ("dense", "orthorank 20 %")


def run(context: Context) -> None:
    machine, sizes = context.machine, context.sizes
    model = random_model(sizes.models[LLAMA_3], device=machine.device, dtype=machine.dtype, layers=sizes.layers)
    variants = variants_of(context, model)
    with one_backend(context) as backend:
        for name in VARIANTS:
            if name in variants:
                turn(context, model, LLAMA_3, (1, sizes.long), name, variants[name], 0, backend, untimed=False)
