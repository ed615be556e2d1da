"""What is compiled for GPUs that need not be present, and the limits it must keep.

A case calls a launcher with tensors that have shapes, dtypes and strides but no data (device "meta"). So what is
compiled is what the launcher launches: its argument specialisation and its launch settings are not repeated here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from orthorank_kernels import _library

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HALF, FLOAT = torch.bfloat16, torch.float32
# What one block may have. A launch beyond it fails; compiling does not.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# AMD's assembly is read for what its metadata says. On Blackwell, a warp does not say how large a matrix product is.
UNMEASURED: dict[str, set[str]] = {
    "gfx942": {"instructions", "wide_loads", "wide_stores", "hot_spills", "ntm", "ntm_masked"},
    "sm_100": {"ntm", "ntm_masked"},
}
MOST_WARPS = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 16}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    ``limits`` name entries of a measurement (see `compile_worker`): an upper bound, or with ``min_`` before the name a
    lower one. ``at`` replaces some of them on some targets; None there lifts a limit. What cannot be measured on a
    target (``UNMEASURED``) is not checked there; a measurement that is missing elsewhere breaks its limit.
    """

    group: str  # compiled by one child process, and one test
    name: str
    launch: Callable[[], Any]
    limits: dict[str, float] = field(default_factory=dict)
    at: dict[str, dict[str, float | None]] = field(default_factory=dict)
    slow: bool = False

    def limits_for(self, target: str) -> dict[str, float]:
        limits = {**self.limits, **self.at.get(target, {})}
        return {name: bound for name, bound in limits.items() if bound is not None}


def broken_limits(measured: dict[str, Any], limits: dict[str, float], target: str) -> list[str]:
    """The limits that a measurement breaks, in words; what a GPU itself cannot do is always among them."""
    hard = {"launches": 1, "shared": SHARED_LIMIT[target], "warps": MOST_WARPS[target]}
    broken = []
    for name, bound in {**hard, **limits}.items():
        lower, name = name.startswith("min_"), name.removeprefix("min_")
        value = measured.get(name)
        if name in UNMEASURED.get(target, ()):
            continue
        if value is None:
            broken.append(f"{name} was not measured")
        elif value < bound if lower else value > bound:
            broken.append(f"{name} is {value:.4g}, {'at least' if lower else 'at most'} {bound}")
    return broken


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(path: str, *args: Any) -> Callable[[], Any]:
    """Calls the launcher ``"module.function"`` of `orthorank_kernels.triton`, imported only then."""
    return lambda: _library.launcher(path)(*args)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some_positions(batch: int, selected: int) -> torch.Tensor:
    return empty(batch, selected, dtype=torch.int32)


# No spills, no atomics, rows move 128 bits at a time. Spill limits are for 16-bit types.
COPY = {"registers": 48, "spills": 0, "atomics": 0, "min_wide_loads": 0.9, "min_wide_stores": 1.0}
NORM = {**COPY, "registers": 64}
# Of a hidden size that no power of two above 8 divides, or of a few hundred bytes, a thread moves few bytes at a time.
NARROW = {"registers": 96, "min_wide_loads": 0.0, "min_wide_stores": 0.0}


def row_cases() -> Iterator[Case]:
    everyday = (576, 4096)
    others = (64, 577, 896, 1000, 2048, 8192, 14336, 20480)
    shapes = [(h, d) for h in (*everyday, *others) for d in (HALF, FLOAT)] + [(h, torch.float16) for h in everyday]
    for hidden, dtype in shapes:
        slow = hidden not in everyday or dtype != HALF
        narrow = NARROW if hidden % 16 or hidden < 512 else {}
        # A longer row takes more than 16 registers of each thread for each of its tensors.
        long = {"registers": 128} if hidden * dtype.itemsize > 16384 else {}
        if hidden * dtype.itemsize > 65536:
            long["spills"] = 64
        x, rows = empty(4, 2048, hidden, dtype=dtype), empty(4, 682, hidden, dtype=dtype)
        positions, weight = some_positions(4, 682), empty(hidden, dtype=dtype)
        for op, args, limits in (
            ("gather_rows", (x, positions), COPY | narrow),
            ("scatter_rows_", (x, positions, rows), COPY | narrow),
            ("gather_add_rms_norm", (x, positions, rows, weight, 1e-5), NORM | narrow | long),
        ):
            yield Case("rows", f"{op} {hidden} {name_of(dtype)}", launch(f"rows.{op}", *args), limits, slow=slow)


def rotary_cases() -> Iterator[Case]:
    everyday = ((32, 128, 128), (32, 64, 64), (9, 64, 64))
    others = ((8, 128, 128), (32, 32, 32), (71, 64, 64), (32, 80, 32), (24, 96, 96), (32, 80, 80), (8, 256, 256),
              (16, 256, 64), (128, 128, 128), (1, 256, 256))  # fmt: skip
    shapes = [(shape, dtype, True) for shape in (*everyday, *others) for dtype in (HALF, FLOAT)]
    shapes += [(shape, dtype, False) for shape in everyday for dtype in (HALF, torch.float16)]
    for (heads, head_dim, rotary_dim), dtype, gathered in shapes:
        slow = (heads, head_dim, rotary_dim) not in everyday or dtype != HALF or not gathered
        x, table = empty(4, 682, heads, head_dim, dtype=dtype).transpose(1, 2), empty(1, 682, rotary_dim, dtype=dtype)
        yield Case(
            "rows",
            f"apply_rotary_at {heads} x {head_dim}/{rotary_dim} {name_of(dtype)}" + ("" if gathered else " all tokens"),
            launch("rotary.apply_rotary_at", x, table, table, some_positions(4, 682) if gathered else None),
            {"registers": 96, "spills": 0, "atomics": 0, "min_wide_stores": 0.0 if slow else 1.0},
            slow=slow,
        )


def scoring_cases() -> Iterator[Case]:
    """The norm with score, alone and with the selection that the last program of a row runs."""
    shapes = [(h, d, 2048) for h in (4096, 64, 576, 577, 896, 2048, 8192, 14336) for d in (HALF, FLOAT)]
    shapes += [(h, d, n) for h in (576, 4096) for d, n in ((torch.float16, 2048), (HALF, 8192), (HALF, 40000))]
    for hidden, dtype, tokens in shapes:
        slow = (hidden, dtype, tokens) != (4096, HALF, 2048)
        x, weight, sink = empty(32, tokens, hidden, dtype=dtype), empty(hidden, dtype=dtype), empty(hidden, dtype=dtype)
        row = empty(32, dtype=torch.int32)
        limits = {"registers": 64 if hidden <= 4096 and dtype != FLOAT else 128, "spills": 0}
        # In the selection, which one program of a row runs once, not in the norm that all run.
        streamed = {"sm_80": {"spills": 2}} if tokens > 2048 else {}
        name = f"{hidden} {tokens} tokens {name_of(dtype)}"
        score = launch("scoring.rms_norm_score", x, weight, 1e-5, sink.expand(32, hidden), None)
        yield Case("scores", f"rms_norm_score {name}", score, {**limits, "atomics": 0}, slow=slow)
        fused = launch(
            "selection.rms_norm_select", x, weight, 1e-5, tokens // 3, None, tokens // 3, None, row, row, None, 1
        )
        yield Case("scores", f"rms_norm_select {name}", fused, {**limits, "registers": 128}, streamed, slow=slow)


def selection_cases() -> Iterator[Case]:
    for tokens in (2048, 8192, 40000):
        for ragged in (False, True):
            row = empty(8, dtype=torch.int32) if ragged else None
            scores, k = empty(8, tokens, dtype=FLOAT), tokens // 3
            yield Case(
                "scores",
                f"select_tokens {tokens} tokens" + (" ragged" if ragged else ""),
                launch("selection.select_tokens", scores, k, row, k, row, row, row, 1),
                {"registers": 128, "spills": 0, "atomics": 0} | ({"instructions": 1000} if tokens == 2048 else {}),
                slow=ragged or tokens == 8192,
            )


# ntm of the unmasked and of the masked loop: see `compile_worker`. Beyond 977 on an H100 and 1953 on an A100, issuing
# instructions takes longer than the matrix products. By head_dim.
ATTENTION = {
    64: {
        "sm_80": {"registers": 248, "spills": 0, "ntm": 870, "ntm_masked": 1180},
        "sm_90": {"registers": 184, "spills": 0, "ntm": 890, "ntm_masked": 1190},
    },
    128: {
        "sm_80": {"registers": 216, "spills": 0, "ntm": 680, "ntm_masked": 830},
        # Measured 642 with the mask that compares keys; the one that compares columns gives 614, and 254 registers.
        "sm_90": {"registers": 216, "spills": 0, "ntm": 490, "ntm_masked": 645},
    },
}
NO_SPILLS = {"sm_100": {"spills": 0}, "gfx942": {"spills": 0}}


def attention(
    dim: int, group: int = 4, dtype: torch.dtype = HALF, window: int | None = None, padded: bool = False, **layout: int
) -> Callable[[], Any]:
    """Query rows as a projection leaves them, keys and values as a cache holds them; a ragged number of each."""
    kv_heads, keys = layout.get("kv_heads", 8), layout.get("keys", 2047)
    q = empty(2, 681, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    k = empty(2, kv_heads, keys, dim, dtype=dtype)
    if layout.get("fused"):  # keys and values as slices of one projection: rows are far apart
        k = empty(2, keys, 3, kv_heads, dim, dtype=dtype)[:, :, 1].transpose(1, 2)
    starts = empty(2, dtype=torch.int32) if padded else None
    return launch(
        "attention.sparse_query_attention", q, k, k, some_positions(2, 681), dim**-0.5, window, starts, keys - 681
    )


def attention_cases() -> Iterator[Case]:
    wide = {"atomics": 0, "min_wide_loads": 0.95, "min_wide_stores": 1.0}
    for dim, at in ATTENTION.items():
        yield Case("attention", f"dim {dim}, groups of 4", attention(dim), wide, {**NO_SPILLS, **at})
    quiet = {"atomics": 0, "hot_spills": 0}
    for dim in (32, 64, 80, 96, 128, 192, 256):
        for dtype in (HALF, torch.float16, FLOAT):
            for group in (1, 4):
                if (dim, dtype, group) not in ((64, HALF, 4), (128, HALF, 4)):
                    # Float32 has no matrix instructions to find its loops by: all its spills count.
                    limits = {"atomics": 0, "spills": 10 if dim == 64 else 0} if dtype == FLOAT else quiet
                    name = f"dim {dim}, groups of {group}, {name_of(dtype)}"
                    yield Case("attention", name, attention(dim, group, dtype), limits, slow=True)
    for dim in (64, 128):
        for name, options in {
            "window": {"window": 1000},
            "padding": {"padded": True},
            "window and padding": {"window": 1000, "padded": True},
            "groups of 7": {"group": 7},
            "groups of 71": {"group": 71, "kv_heads": 1},
            "fused layout": {"fused": 1},
            "64-bit rows": {"keys": 2**26, "kv_heads": 1, "fused": 1},
        }.items():
            at = {target: {"ntm": 1.15 * limits["ntm"]} for target, limits in ATTENTION[dim].items()}
            yield Case("attention", f"dim {dim}, {name}", attention(dim, **options), quiet, at, slow=True)


CASES = (*row_cases(), *rotary_cases(), *scoring_cases(), *selection_cases(), *attention_cases())
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
