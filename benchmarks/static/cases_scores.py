"""Cases of the norm with score."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.static.case import FLOAT, HALF, Case, empty, launch, name_of
from orthorank_kernels.triton.configs import next_power_of_2

AHEAD = ("residual, own sink", "packed, residual")  # options with which loads run ahead as well


def score_launch(x: torch.Tensor, weight: torch.Tensor | None, **options: Any) -> Callable[[], Any]:
    """Calls the launcher of rms_norm_score with the public defaults of what is not given."""
    arguments = {
        "residual": None,
        "norm": "rms",
        "bias": None,
        "weight_offset": 0.0,
        "score": "inner",
        "sink": None,
        "starts": None,
        "cu_seqlens": None,
        "write_norm": True,
        "copy_input": False,
    }
    assert options.keys() <= arguments.keys()
    return launch("scoring.rms_norm_score", x, weight, 1e-5, *{**arguments, **options}.values())


def in_flight(hidden: int) -> dict[str, dict[str, float]]:
    """Limits where an SM needs most under way: 48 KiB of states, of which the copies fill a block up."""
    limits = {"min_in_flight": (48 << 10) * next_power_of_2(hidden) / hidden, "min_occupancy": 0.37}
    return {target: dict(limits) for target in ("sm_90", "sm_100")}


def score_options(batch: int, tokens: int, hidden: int) -> dict[str, tuple[dict[str, float], Callable[[], Any]]]:
    """Options of rms_norm_score in 16 bits, with the registers that a row of 4096 takes.

    A bias, and a weight plus an offset, stay in registers as float32 through the loop over rows.
    """
    x, packed, vector = empty(batch, tokens, hidden), empty(batch * tokens, hidden), empty(hidden)
    sinks, starts = empty(batch, hidden), empty(batch, dtype=torch.int32)
    ends = empty(batch + 1, dtype=torch.int32)
    layer = {"norm": "layer", "bias": vector}
    return {
        "residual, own sink": ({"registers": 64}, score_launch(x, vector, residual=x, starts=starts)),
        "packed, residual": (
            {"registers": 64},
            score_launch(packed, vector, residual=packed, sink=sinks, cu_seqlens=ends),
        ),
        "Gemma, cosine": (
            {"registers": 80},
            score_launch(x, vector, weight_offset=1.0, score="cosine", sink=sinks, copy_input=True),
        ),
        "LayerNorm, scores alone": ({"registers": 96}, score_launch(x, vector, **layer, sink=vector, write_norm=False)),
        "packed LayerNorm, residual, own sink, cosine": (
            {"registers": 128},
            score_launch(packed, vector, **layer, residual=packed, score="cosine", cu_seqlens=ends),
        ),
        "scores of the hidden states": ({"registers": 64}, score_launch(x, None, norm="identity", sink=sinks)),
    }


def scoring_cases() -> Iterator[Case]:
    shapes = [(h, d, 2048) for h in (4096, 64, 576, 577, 896, 2048, 8192, 14336) for d in (HALF, FLOAT)]
    shapes += [(3072, HALF, 2048)]
    shapes += [(h, d, n) for h in (576, 4096) for d, n in ((torch.float16, 2048), (HALF, 8192), (HALF, 40000))]
    for hidden, dtype, tokens in shapes:
        slow = (hidden, dtype, tokens) != (4096, HALF, 2048)
        x, weight, sink = empty(32, tokens, hidden, dtype=dtype), empty(hidden, dtype=dtype), empty(hidden, dtype=dtype)
        limits = {"registers": 64 if hidden <= 4096 and dtype != FLOAT else 128, "spills": 0}
        name = f"{hidden} {tokens} tokens {name_of(dtype)}"
        score = score_launch(x, weight, sink=sink.expand(32, hidden))
        at = in_flight(hidden) if 2048 <= hidden <= 8192 and dtype != FLOAT else {}
        yield Case("scores", f"rms_norm_score {name}", score, {**limits, "atomics": 0}, at, slow=slow)
    for hidden in (4096, 576, 8192):
        for option, (limits, score) in score_options(32, 2048, hidden).items():
            limits = limits if hidden <= 4096 else {"registers": 128}
            slow = hidden != 4096 or "cosine" in option
            name = f"rms_norm_score {hidden} {option}"
            at = in_flight(hidden) if hidden == 4096 and option in AHEAD else {}
            yield Case("scores", name, score, {**limits, "spills": 0, "atomics": 0}, at, slow=slow)
