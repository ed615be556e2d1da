"""What `orthorank_kernels.tuning.tune` tries and times for each op: settings worth a measurement, and a launch to time.

A problem is as large as one layer of a model is for a full GPU: some tens of thousands of tokens in bfloat16, of which
a third is selected. Two functions for each kind of op: ``_search_*`` gives changes of the default settings, ``_run_*``
a launch that returns a tensor by which settings are compared.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels.ops.activation import silu_and_mul
from orthorank_kernels.ops.add_norm import gather_add_rms_norm
from orthorank_kernels.ops.attention import sparse_query_attention
from orthorank_kernels.ops.low_rank import add_low_rank
from orthorank_kernels.ops.norm_score import rms_norm_score
from orthorank_kernels.ops.norm_selection import rms_norm_select
from orthorank_kernels.ops.rotary import apply_rotary_at
from orthorank_kernels.ops.rows import gather_rows, scatter_rows_
from orthorank_kernels.ops.selection import select_tokens
from orthorank_kernels.settings.lookup import LEGAL, Settings

MOST_REGISTERS = 160  # of a thread, for float32 accumulators and scores; with more of them it spills
SHARED_KIB = {"volta": 64, "ampere": 163, "ampere-small": 99, "hopper": 227, "blackwell": 227, "amd": 64}
MOST_WARPS = {"amd": 16}
KIND = re.compile(r"(\d+)-bit, head_dim (\d+)(?:, (\d+) rows)?")
TOKENS, KV_HEADS, GROUP = 8192, 8, 4  # of attention
ROWS, LENGTH = 8, 2048  # of the other ops
HIDDEN, RANK = 4096, 64  # of the norm with selection, and of maps
SCORES = {"short": 2048, "long": 8192, "streamed": 32768, "packed": 2048}  # tokens of a row or sequence, by kind
FUSED = {"short": 2048, "streamed": 16384, "packed": 2048, "threshold": 2048}
EPS = 1e-5
HALF = torch.bfloat16
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """How an op is tuned: ``search(kind, default, family)`` and ``run(kind, random)``; see the module's docstring."""

    search: Callable[[str, Settings, str], Iterator[dict[str, int]]]
    run: Callable[[str, "Random"], Run]


class Random:
    """Seeded random tensors on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)

    def floats(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device)

    def positions(self, batch: int, selected: int, tokens: int) -> Tensor:
        """Ascending, evenly over the tokens."""
        evenly = torch.linspace(0, tokens - 1, selected, device=self.device)
        return evenly.round().to(torch.int32).expand(batch, -1).contiguous()

    def ends(self, sequences: int, length: int) -> Tensor:
        return torch.arange(sequences + 1, dtype=torch.int32, device=self.device) * length


class Blank(Random):
    """Tensors of the same shapes whose values are not set, for launches that compile and do not run."""

    def __init__(self, device: torch.device):
        self.device = device

    def floats(self, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def positions(self, batch: int, selected: int, tokens: int) -> Tensor:
        return torch.arange(selected, dtype=torch.int32, device=self.device).repeat(batch, 1)


def search(op: str, kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    """Settings of ``op`` worth a measurement beside the default, distinct, and within what is legal."""
    most_warps = MOST_WARPS.get(family, LEGAL["num_warps"][1])
    seen = [dict(default)]
    for changes in PROBLEMS[op].search(kind, default, family):
        found = {**default, **changes}
        legal = all(LEGAL[name][0] <= value <= LEGAL[name][1] for name, value in found.items())
        if found not in seen and legal and found.get("num_warps", 1) <= most_warps:
            seen.append(found)
            yield found


def problem(op: str, kind: str, device: torch.device) -> Run:
    """A launch of ``op`` that takes the settings of ``kind``."""
    return PROBLEMS[op].run(kind, Random(device))


def parse(kind: str) -> tuple[int, int, int]:
    """Of attention: bits of a number, head_dim, and rows of a tile that few queries leave (0: many)."""
    found = KIND.fullmatch(kind)
    if found is None:
        raise ValueError(f"kind is {kind!r}; it must be as {KIND.pattern!r}")
    bits, head_dim, rows = (int(number or 0) for number in found.groups())
    return bits, head_dim, rows


def _number(kind: str) -> int:
    """The one in the name of a kind."""
    return int(re.findall(r"\d+", kind)[0])


def _around(value: int, *factors: float) -> list[int]:
    return [max(1, int(value * factor)) for factor in factors]


def _grid(**choices: list[int]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _search_attention(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    """What is not known to lose, as these do.

    What spills: accumulators and scores are ``block_m * (head_dim + block_n)`` float32 numbers over all threads. What
    shared memory does not hold: each stage has a block of K and one of V.
    """
    bits, head_dim, rows = parse(kind)
    for tile in _grid(
        block_m=[rows] if rows else [64, 128],
        block_n=[16, 32, 64] if bits == 32 else [32, 64, 128],
        num_warps=[2, 4, 8] if rows else [4, 8],
        num_stages=[1, 2] if family in ("volta", "amd") else [2, 3, 4],  # no loads that run ahead there
    ):
        threads = tile["num_warps"] * (64 if family == "amd" else 32)
        fits = tile["num_stages"] * 2 * tile["block_n"] * head_dim * bits // 8 <= SHARED_KIB[family] << 10
        if fits and tile["block_m"] * (head_dim + tile["block_n"]) <= MOST_REGISTERS * threads:
            yield tile


def _run_attention(kind: str, random: Random) -> Run:
    """A third of a long prompt, or a few queries over it."""
    bits, head_dim, rows = parse(kind)
    queries = max(1, rows // GROUP) if rows else TOKENS // 3
    return _attention(random, torch.float32 if bits == 32 else HALF, queries, head_dim)


def _attention(random: Random, dtype: torch.dtype, queries: int, head_dim: int) -> Run:
    q = random.floats(2, queries, KV_HEADS * GROUP, head_dim, dtype=dtype).transpose(1, 2)
    k, v = (random.floats(2, KV_HEADS, TOKENS, head_dim, dtype=dtype) for _ in range(2))
    positions = random.positions(2, queries, TOKENS)
    return lambda: sparse_query_attention(q, k, v, positions, backend="triton")


def _search_combine(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    return _grid(rows=_around(default["rows"], 0.5, 1, 2), num_warps=_around(default["num_warps"], 0.5, 1, 2))


def _run_combine(kind: str, random: Random) -> Run:
    return _attention(random, HALF, 4, _number(kind))


def _search_bytes(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    """From 32 to 256 bytes in flight for a thread."""
    for found in _grid(bytes=_around(default["bytes"], 0.25, 0.5, 1, 2), num_warps=[1, 2, 4, 8]):
        if 32 <= found["bytes"] // (32 * found["num_warps"]) <= 256:
            yield found


def _rows(kind: str, random: Random) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, positions of a third of them, and rows for these."""
    hidden, selected = _number(kind) // HALF.itemsize, LENGTH // 3
    x, rows = random.floats(ROWS, LENGTH, hidden), random.floats(ROWS, selected, hidden)
    return x, random.positions(ROWS, selected, LENGTH), rows


def _run_gather(kind: str, random: Random) -> Run:
    x, positions, _ = _rows(kind, random)
    return lambda: gather_rows(x, positions, backend="triton")


def _run_scatter(kind: str, random: Random) -> Run:
    x, positions, rows = _rows(kind, random)

    def run() -> Tensor:
        out = torch.zeros_like(x)  # else a launch that wrote nothing would find what the one before it wrote
        scatter_rows_(out, positions, rows, backend="triton")
        return out

    return run


def _run_silu(kind: str, random: Random) -> Run:
    width = _number(kind) // HALF.itemsize
    if kind == "rows of 4096 bytes":  # and more: seven of them, as 14336 has
        width *= 7
    merged = random.floats(ROWS, LENGTH // 3, 2 * width)
    return lambda: silu_and_mul(merged, backend="triton")


def _search_low_rank(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    """Tiles of which a thread has 32 to 128 sums."""
    for tile in _grid(block_m=[32, 64, 128], block_n=[64, 128, 256], num_warps=[4, 8]):
        if 32 <= tile["block_m"] * tile["block_n"] // (32 * tile["num_warps"]) <= 128:
            yield tile


def _run_low_rank(kind: str, random: Random) -> Run:
    dtype = torch.float32 if kind == "32-bit" else HALF
    x, low = random.floats(ROWS, LENGTH, HIDDEN, dtype=dtype), random.floats(ROWS, LENGTH, RANK, dtype=dtype)
    up, bias = random.floats(HIDDEN, RANK, dtype=dtype), random.floats(HIDDEN, dtype=dtype)
    return lambda: add_low_rank(x, low, up, bias, backend="triton")


def _run_rotary(kind: str, random: Random) -> Run:
    heads, selected = _number(kind) // (128 * HALF.itemsize), LENGTH // 3
    x, angles = random.floats(ROWS, selected, heads, 128).transpose(1, 2), random.floats(1, LENGTH, 64)
    table = torch.cat([angles, angles], dim=-1)  # the halves of a table of this width are alike
    positions = random.positions(ROWS, selected, LENGTH)
    return lambda: apply_rotary_at(x, table, table, positions, backend="triton")


def _search_add_norm(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    warps = _around(default["num_warps"], 0.5, 1, 2)
    return _grid(num_warps=warps, rows=[4, 8, 16], few_rows=_around(default["few_rows"], 0.5, 1, 2))


def _run_add_norm(kind: str, random: Random) -> Run:
    hidden, selected = _number(kind), LENGTH // 3
    x, addend, weight = (
        random.floats(ROWS, LENGTH, hidden),
        random.floats(ROWS, selected, hidden),
        random.floats(hidden),
    )
    positions = random.positions(ROWS, selected, LENGTH)
    return lambda: gather_add_rms_norm(x, positions, addend, weight, EPS, backend="triton").normed


def _search_norm(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    return _grid(
        num_warps=_around(default["num_warps"], 0.5, 1, 2),
        enough_programs=_around(default["enough_programs"], 0.5, 1, 2),
        shared_part=_around(default["shared_part"], 0.5, 1, 2),
    )


def _run_norm(kind: str, random: Random) -> Run:
    hidden = _number(kind)
    x, weight, sink = random.floats(ROWS, LENGTH, hidden), random.floats(hidden), random.floats(hidden)
    return lambda: rms_norm_score(x, weight, EPS, sink=sink, backend="triton").scores


def _search_selection(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    """Rows that stay in registers are as long as the kind says; tiles are not."""
    whole = kind in ("short rows", "long rows")
    tokens = [default["tokens"]] if whole else _around(default["tokens"], 0.5, 1, 2)
    return _grid(tokens=tokens, num_warps=_around(default["num_warps"], 0.25, 0.5, 1, 2))


def _run_selection(kind: str, random: Random) -> Run:
    length = SCORES[re.split("[ ,]", kind)[0]]
    request: dict[str, Any] = {"threshold": 0.0} if "threshold" in kind else {"k": length // 3}
    scores = random.floats(4 * ROWS, length, dtype=torch.float32)
    if not kind.startswith("packed"):
        return lambda: select_tokens(scores, **request, backend="triton").positions
    packed, ends = scores.flatten(), random.ends(4 * ROWS, length)
    return lambda: select_tokens(packed, **request, cu_seqlens=ends, backend="triton").positions


def _search_fused(kind: str, default: Settings, family: str) -> Iterator[dict[str, int]]:
    return _grid(tokens=_around(default["tokens"], 0.5, 1, 2, 4))


def _run_fused(kind: str, random: Random) -> Run:
    length = FUSED[re.split("[ ,]", kind)[0]]
    batch = max(1, ROWS * LENGTH // length)
    x, weight, sink = random.floats(batch, length, HIDDEN), random.floats(HIDDEN), random.floats(HIDDEN)
    request: dict[str, Any] = {"threshold": 0.5} if "threshold" in kind else {"k": length // 3}
    if not kind.startswith(("packed", "threshold")):
        return lambda: rms_norm_select(x, weight, EPS, sink=sink, **request, backend="triton").positions
    packed, ends = x.flatten(0, 1), random.ends(batch, length)
    return lambda: (
        rms_norm_select(packed, weight, EPS, sink=sink, cu_seqlens=ends, **request, backend="triton").positions
    )


PROBLEMS = {
    "sparse_query_attention": Problem(_search_attention, _run_attention),
    "combine_splits": Problem(_search_combine, _run_combine),
    "rms_norm_score": Problem(_search_norm, _run_norm),
    "select_tokens": Problem(_search_selection, _run_selection),
    "rms_norm_select": Problem(_search_fused, _run_fused),
    "gather_rows": Problem(_search_bytes, _run_gather),
    "scatter_rows_": Problem(_search_bytes, _run_scatter),
    "gather_add_rms_norm": Problem(_search_add_norm, _run_add_norm),
    "apply_rotary_at": Problem(_search_bytes, _run_rotary),
    "silu_and_mul": Problem(_search_bytes, _run_silu),
    "add_low_rank": Problem(_search_low_rank, _run_low_rank),
}
