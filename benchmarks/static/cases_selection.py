"""Cases of the selection, alone and in one launch with the norm and the score."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.static.case import FLOAT, HALF, Case, empty, launch, name_of
from benchmarks.static.cases_scores import in_flight
from orthorank_kernels.layout import SCORE_BINS

MANY = 32  # rows or sequences of a launch


def index(n: int = MANY) -> torch.Tensor:
    return empty(n, dtype=torch.int32)


def requested(width: int, **request: Any) -> list[Any]:
    """The launchers' arguments of a selection, in order."""
    arguments: dict[str, Any] = dict.fromkeys(("k", "seq_k", "threshold", "seq_threshold", "width"))
    arguments |= dict.fromkeys(("starts", "lengths", "sink_positions", "cu_seqlens", "position_offsets"))
    assert request.keys() <= arguments.keys()
    return list({**arguments, **request, "width": width, "keep_last": 1}.values())


def of_a_batch() -> dict[str, torch.Tensor]:
    return {"starts": index(), "lengths": index(), "sink_positions": index()}


def packed() -> dict[str, torch.Tensor]:
    return {"cu_seqlens": index(MANY + 1), "sink_positions": index(), "position_offsets": index()}


def select_launch(scores: torch.Tensor, indexer: bool = False, **request: Any) -> Callable[[], Any]:
    """``indexer``: the largest, counted from each row's start."""
    return launch("selection.select_tokens", scores, *requested(**request), indexer, indexer)


def fused_launch(x: torch.Tensor, weight: torch.Tensor, **request: Any) -> Callable[[], Any]:
    sinks = empty(MANY, weight.shape[0], dtype=weight.dtype)
    of_the_norm = (None, "rms", None, 0.0, "inner", sinks, True, False)
    workspace = index(MANY * (1 + SCORE_BINS))
    return launch("norm_selection.rms_norm_select", x, weight, 1e-5, *of_the_norm, *requested(**request), workspace)


def selection_cases() -> Iterator[Case]:
    limits = {"registers": 128, "spills": 0, "atomics": 0}
    for tokens in (2048, 8192, 40000):
        scores, thresholds = empty(MANY, tokens, dtype=FLOAT), empty(MANY, dtype=FLOAT)
        k, slow, few = tokens // 3, tokens == 8192, {"instructions": 1000} if tokens == 2048 else {}
        name = f"select_tokens {tokens} tokens"
        plain = select_launch(scores, k=k, width=k)
        yield Case("scores", name, plain, limits | few, slow=slow)
        ragged = select_launch(scores, k=k, seq_k=index(), width=k, **of_a_batch())
        yield Case("scores", f"{name} ragged", ragged, limits | few, slow=True)
        largest = select_launch(scores, k=k, width=k, indexer=True, **of_a_batch())
        yield Case("scores", f"{name} largest", largest, limits | few, slow=True)
        below = select_launch(scores, seq_threshold=thresholds, width=tokens, **of_a_batch())
        yield Case("scores", f"{name} threshold", below, limits | few, slow=slow)
    smallest = select_launch(scores[0], k=tokens, seq_k=index(), width=tokens, **packed())
    yield Case("scores", "select_tokens packed", smallest, limits)
    below = select_launch(scores[0], seq_threshold=thresholds, width=tokens, **packed())
    yield Case("scores", "select_tokens packed threshold", below, limits | {"instructions": 1000})


def norm_selection_cases() -> Iterator[Case]:
    """The norm with score and selection. All programs norm, few select: their registers are the norm's, at 4096."""
    shapes = [(h, d, 2048) for h in (4096, 64, 576, 577, 896, 2048, 8192, 14336) for d in (HALF, FLOAT)]
    shapes += [(h, d, n) for h in (576, 4096) for d, n in ((torch.float16, 2048), (HALF, 8192), (HALF, 40000))]
    for hidden, dtype, tokens in shapes:
        slow = (hidden, dtype, tokens) != (4096, HALF, 2048)
        x, weight = empty(MANY, tokens, hidden, dtype=dtype), empty(hidden, dtype=dtype)
        name = f"rms_norm_select {hidden} {tokens} tokens {name_of(dtype)}"
        limits = {"registers": 128 if slow else 64, "spills": 0}
        fused = fused_launch(x, weight, k=tokens // 3, width=tokens // 3, **of_a_batch())
        # In the selection, which one program of a row reaches, once.
        counts = {576: {"sm_90": 2, "sm_100": 4}, 4096: {"sm_90": 6, "sm_100": 6}}
        some = counts.get(hidden, {}) if tokens > 2048 else {}
        ahead = in_flight(hidden) if hidden == 4096 and dtype != FLOAT else {}
        counting = {t: {**ahead.get(t, {}), "spills": n} for t, n in some.items()} if some else ahead
        yield Case("scores", name, fused, limits, counting, slow=slow)
        if tokens == 2048:
            # 69 and 70 on sm_90 and sm_100: three programs share a multiprocessor there, not four.
            most = {"registers": 128 if slow else 72}
            below = fused_launch(x, weight, threshold=0.5, width=tokens, **of_a_batch())
            yield Case("scores", f"{name} threshold", below, limits | most, ahead, slow=slow)
            # Spilled is in the selection, which one program of a sequence runs once, not in the norm that all run: to
            # fit more programs on an SM, and on AMD scalar registers (masks), into lanes of a vector register.
            limits = limits | ({"spills": 6} if slow else {})
            masks = {"gfx942": {"spills": 26}} if hidden > 4096 else ahead
            smallest = fused_launch(x[0], weight, k=tokens, seq_k=index(), width=tokens, **packed())
            registers = {"registers": 128 if slow else 96}
            yield Case("scores", f"{name} packed", smallest, limits | registers, masks, slow=slow)
            below = fused_launch(x[0], weight, threshold=0.5, width=tokens, **packed())
            yield Case("scores", f"{name} packed threshold", below, limits | most, masks, slow=slow)
