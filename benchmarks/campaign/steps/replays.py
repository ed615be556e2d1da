"""A captured graph gives the bits of an eager call after its inputs changed: every op, and a patched tiny model."""

from typing import Any

import torch

from benchmarks.campaign.measure import Context
from benchmarks.campaign.sizes import TINY
from orthorank import OrthoRankConfig, apply
from orthorank.speed.random_weights import random_model
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Sizes, calls, flat

TOKENS = 64


def run(context: Context) -> None:
    device, sizes = context.machine.device.type, Sizes(dtype=context.machine.dtype)
    for name in calls(Numbers(device), sizes):
        with context.guard(kind="check", what=name):
            # Calls share tensors, and an op that changes one in place would change those of the next.
            one_op(context, *(calls(Numbers(device, seed), sizes)[name] for seed in (0, 1, 1)))
            context.lines.write(kind="check", what=name, status="ok")
    with context.guard(kind="check", what="a patched model"):
        model_replays(context)
        context.lines.write(kind="check", what="a patched model", status="ok")


def one_op(context: Context, captured: Call, fresh: Call, expected: Call) -> None:
    """Capture one call, give it the inputs of another, replay, and compare with that one's results."""

    def results(call: Call, returned: Any) -> list[torch.Tensor]:
        return call.written() if call.op in IN_PLACE else flat(returned)

    returned, replay = context.machine.capture(captured)
    given = fresh.tensors()
    for place, x in captured.tensors().items():
        x.copy_(given[place])
    replay()
    got = results(captured, returned)
    for a, b in zip(got, results(expected, expected()), strict=True):
        same(a, b)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = got.contiguous().view(kind) != expected.contiguous().view(kind)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} values differ from the eager call's"


def model_replays(context: Context) -> None:
    machine = context.machine
    model = random_model(TINY, device=machine.device, dtype=machine.dtype)
    prompts = torch.randint(0, model.config.vocab_size, (2, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    prompt, other = prompts.to(machine.device)
    with apply(model, OrthoRankConfig(layers=[2, 5, 7], keep_ratio=1 / 3)):

        def forward() -> torch.Tensor:
            return model(input_ids=prompt, use_cache=False).logits

        logits, replay = machine.capture(forward)
        before = logits.clone()
        prompt.copy_(other)
        replay()
        same(logits, forward())
        assert not torch.equal(before, logits), "another prompt changed nothing"
