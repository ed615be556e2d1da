"""What is counted: each op on a shape of its own, the fewest bytes that it could move, and its limits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import orthorank_kernels as ops
from benchmarks.static.pairs import selected_positions
from benchmarks.traffic.counting import bytes_of, counted
from orthorank_kernels.settings import lookup as _settings

HALF = torch.float16  # as wide as bfloat16, which the interpreter takes for integers


@dataclass(frozen=True)
class Case:
    """One call of an op.

    ``build`` returns the call, the bytes that any kernel has to read, and those that it has to write. ``limits`` are
    upper bounds of what `count` returns, by name.
    """

    op: str
    shape: str
    build: Callable[[], tuple[Callable[[], Any], int, int]]
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def count(case: Case) -> dict[str, Any]:
    """Counts of one case, by name; ``requested`` and ``unique`` are bytes, and ratios to the minimum."""
    call, read, written = case.build()
    with counted() as traffic:
        call()
    minimum = read + written
    return {
        "op": case.op,
        "shape": case.shape,
        "launches": traffic.launches,
        "programs": traffic.programs,
        "minimum_bytes": minimum,
        "unique_bytes": traffic.unique,
        "requested_bytes": traffic.requested,
        "unique": round(traffic.unique / minimum, 4),
        "requested": round(traffic.requested / minimum, 4),
        "atomics": traffic.atomics,
    }


def broken_limits(case: Case, counts: dict[str, Any]) -> list[str]:
    return [
        f"{case.name}: {name} is {counts[name]:.4g}, at most {bound}"
        for name, bound in case.limits.items()
        if counts[name] > bound
    ]


def positions_of(tokens: int, selected: int) -> torch.Tensor:
    return torch.tensor([selected_positions(tokens, selected)], dtype=torch.int32)


MANY = ", rows as in a large batch"
ONCE = {"launches": 1, "unique": 1.0}


def with_setting(module: str, name: str, value: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` with a launch setting of `orthorank_kernels.triton` that it would choose for a larger problem."""

    def changed() -> None:
        with mock.patch(f"orthorank_kernels.triton.{module}.{name}", value):
            call()

    return changed


def with_settings(op: str, kind: str, call: Callable[[], Any], **changes: int) -> Callable[[], Any]:
    """``call`` with other launch settings, so that it runs as a larger problem would."""

    def changed() -> None:
        with _settings.overridden(op, kind, {**_settings.default(op, kind, _settings.INTERPRETER), **changes}):
            call()

    return changed


def gather(hidden: int) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x, positions = torch.zeros(1, 512, hidden, dtype=HALF), positions_of(512, 170)
        moved = 170 * hidden * x.element_size()
        return lambda: ops.gather_rows(x, positions, backend="triton"), moved + bytes_of(positions), moved

    return Case("gather_rows", f"170 of 512 x {hidden}", build, {**ONCE, "requested": 1.0, "atomics": 0})


def scatter(hidden: int) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x, positions = torch.zeros(1, 512, hidden, dtype=HALF), positions_of(512, 170)
        rows = torch.ones(1, 170, hidden, dtype=HALF)
        return (
            lambda: ops.scatter_rows_(x, positions, rows, backend="triton"),
            bytes_of(rows, positions),
            bytes_of(rows),
        )

    return Case("scatter_rows_", f"170 of 512 x {hidden}", build, {**ONCE, "requested": 1.0, "atomics": 0})


def scatter_add(hidden: int) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x, positions = torch.zeros(1, 512, hidden, dtype=HALF), positions_of(512, 170)
        rows, residual = torch.ones(1, 170, hidden, dtype=HALF), torch.ones(1, 170, hidden, dtype=HALF)
        return (
            lambda: ops.scatter_add_rows_(x, positions, rows, residual, backend="triton"),
            bytes_of(rows, residual, positions),
            bytes_of(rows),
        )

    return Case("scatter_add_rows_", f"170 of 512 x {hidden}", build, {**ONCE, "requested": 1.0, "atomics": 0})


def gate(width: int) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        merged = torch.ones(1, 60, 2 * width, dtype=HALF)
        return lambda: ops.silu_and_mul(merged, backend="triton"), bytes_of(merged), bytes_of(merged) // 2

    return Case("silu_and_mul", f"60 x {width}", build, {**ONCE, "requested": 1.0, "atomics": 0})


def low_rank(hidden: int, rank: int) -> Case:
    """The map's low-rank states and its rows are read once for each block of columns, or tile of tokens."""

    def build() -> tuple[Callable[[], Any], int, int]:
        x, low = torch.ones(1, 256, hidden, dtype=HALF), torch.ones(1, 256, rank, dtype=HALF)
        up, bias = torch.ones(hidden, rank, dtype=HALF), torch.ones(hidden, dtype=HALF)
        return lambda: ops.add_low_rank(x, low, up, bias, backend="triton"), bytes_of(x, low, up, bias), bytes_of(x)

    limits = {**ONCE, "requested": 1.7, "atomics": 0}
    return Case("add_low_rank", f"256 x {hidden}, rank {rank}", build, limits)


def gather_add_norm(hidden: int, many: bool) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x, positions = torch.ones(1, 512, hidden, dtype=HALF), positions_of(512, 170)
        rows, weight = torch.ones(1, 170, hidden, dtype=HALF), torch.ones(hidden, dtype=HALF)
        call = lambda: ops.gather_add_rms_norm(x, positions, rows, weight, 1e-5, backend="triton")  # noqa: E731
        call = with_settings("gather_add_rms_norm", "hidden 4096", call, few_rows=1) if many else call
        return call, 2 * bytes_of(rows) + bytes_of(positions, weight), 2 * bytes_of(rows)

    limits = {**ONCE, "requested": 1.05 if many else 1.26, "atomics": 0}
    return Case("gather_add_rms_norm", f"170 of 512 x {hidden}{MANY if many else ''}", build, limits)


def rotary(heads: int, head_dim: int) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x = torch.ones(1, 170, heads, head_dim, dtype=HALF).transpose(1, 2)
        cos, positions = torch.ones(1, 512, head_dim, dtype=HALF), positions_of(512, 170)
        sin, angles = torch.ones_like(cos), 170 * head_dim // 2 * cos.element_size()
        return (
            lambda: ops.apply_rotary_at(x, cos, sin, positions, backend="triton"),
            bytes_of(x, positions) + 2 * angles,
            bytes_of(x),
        )

    return Case("apply_rotary_at", f"170 x {heads} x {head_dim}", build, {**ONCE, "requested": 1.0, "atomics": 0})


def kv_cache(kv_heads: int, head_dim: int) -> Case:
    """The angles of a token are asked for once for each head, which memory serves once."""

    def build() -> tuple[Callable[[], Any], int, int]:
        merged = torch.ones(170, 2 * kv_heads, head_dim, dtype=HALF)
        k_cache, v_cache = torch.zeros(12, kv_heads, 16, 2 * head_dim, dtype=HALF).transpose(1, 2).split(head_dim, -1)
        table, positions = torch.ones(512, head_dim, dtype=HALF), positions_of(512, 170)[0]
        how, slots = {"rotary_dim": head_dim, "backend": "triton"}, torch.arange(170)
        to, rows, tables = (k_cache, v_cache, slots), merged.split(kv_heads, 1), table.split(head_dim // 2, -1)
        return (
            lambda: ops.apply_rotary_and_cache_(*to, *rows, *tables, positions, **how),
            bytes_of(merged, slots, positions) + 170 * head_dim * HALF.itemsize,
            bytes_of(merged),
        )

    limits = {**ONCE, "requested": 1.25, "atomics": 0}
    return Case("apply_rotary_and_cache_", f"170 x {kv_heads} x {head_dim}", build, limits)


def norm_score(hidden: int, many: bool) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x, weight = torch.ones(1, 256, hidden, dtype=HALF), torch.ones(hidden, dtype=HALF)
        call = lambda: ops.rms_norm_score(x, weight, 1e-5, backend="triton")  # noqa: E731
        call = with_settings("rms_norm_score", "hidden 4096", call, enough_programs=16) if many else call
        return call, bytes_of(x, weight), bytes_of(x) + 4 * 256

    limits = {**ONCE, "requested": 1.10 if many else 2.05, "atomics": 0}
    return Case("rms_norm_score", f"256 x {hidden}{MANY if many else ''}", build, limits)


def norm_select(hidden: int) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        x, weight = torch.ones(1, 256, hidden, dtype=HALF), torch.ones(hidden, dtype=HALF)
        scores, k = 4 * 256, 85
        call = lambda: ops.rms_norm_select(x, weight, 1e-5, k, backend="triton")  # noqa: E731
        call = with_settings("rms_norm_score", "hidden 4096", call, enough_programs=16)
        return call, bytes_of(x, weight) + scores, bytes_of(x) + scores + 4 * (k + 1)

    # Of the scores, which the program that finishes a row reads back, and the counter of finished programs.
    return Case(
        "rms_norm_select", f"256 x {hidden}, k 85{MANY}", build, {"launches": 1, "unique": 1.001, "requested": 1.10}
    )


def norm_select_long(tokens: int) -> Case:
    """Of two channels, so that scores weigh most: written once, counted by an atomic each, and read twice."""

    def build() -> tuple[Callable[[], Any], int, int]:
        x = torch.randn(1, tokens, 2, generator=torch.Generator().manual_seed(0)).to(HALF)
        scores, k = 4 * tokens, tokens // 3
        options: dict[str, Any] = {"norm": "identity", "write_norm": False, "backend": "triton"}
        call = lambda: ops.rms_norm_select(x, None, 1e-5, k, **options)  # noqa: E731
        return call, bytes_of(x) + scores, scores + 4 * (k + 1)

    shape = f"{tokens:,} x 2, k {tokens // 3:,}, scores counted"
    return Case("rms_norm_select", shape, build, {"launches": 1, "requested": 1.7})


def select(tokens: int, requested: float) -> Case:
    def build() -> tuple[Callable[[], Any], int, int]:
        scores, k = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0)), tokens // 3
        return lambda: ops.select_tokens(scores, k, backend="triton"), bytes_of(scores), 4 * (k + 1)

    return Case("select_tokens", f"{tokens // 3:,} of {tokens:,}", build, {**ONCE, "requested": requested})


def select_below(tokens: int) -> Case:
    """Compaction below a threshold: scores once, in tiles."""

    def build() -> tuple[Callable[[], Any], int, int]:
        scores = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0))
        call = lambda: ops.select_tokens(scores, threshold=1 / 3, backend="triton")  # noqa: E731
        return call, bytes_of(scores), 4 * (tokens + 1)

    return Case("select_tokens", f"threshold, {tokens:,}", build, {**ONCE, "requested": 1.0, "atomics": 0})


def packed_lengths(sequences: int, tokens: int) -> torch.Tensor:
    """Where sequences of unequal length begin and end."""
    inner = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(1))[: sequences - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])]).int()


def select_packed(sequences: int, tokens: int, by_threshold: bool) -> Case:
    """Besides scores and positions, each program reads where all sequences begin, and how many each selects."""

    def build() -> tuple[Callable[[], Any], int, int]:
        scores = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
        ends = packed_lengths(sequences, tokens)
        k = torch.diff(ends) // 3
        request = {"threshold": 1 / 3} if by_threshold else {"k": k}
        call = lambda: ops.select_tokens(scores, **request, cu_seqlens=ends, backend="triton")  # noqa: E731
        return call, bytes_of(scores, ends) + (0 if by_threshold else bytes_of(k)), 4 * (2 * tokens + 2 * sequences + 1)

    name = f"packed{', threshold' if by_threshold else ''}, {sequences} sequences of {tokens:,}"
    # By a threshold a search among the chosen rows, which 256 threads do, finds where each sequence begins: 8 of them
    # or 256, in cached lines.
    limits = {"launches": 1, "unique": 1.01, "requested": 3.1} if by_threshold else {**ONCE, "requested": 1.1}
    limits["atomics"] = 0
    return Case("select_tokens", name, build, limits)


def norm_score_packed(sequences: int, hidden: int) -> Case:
    """Stored sinks, one for each sequence; a program reads the sinks of the sequences that it has tokens of."""

    def build() -> tuple[Callable[[], Any], int, int]:
        x, weight = torch.ones(256, hidden, dtype=HALF), torch.ones(hidden, dtype=HALF)
        ends = packed_lengths(sequences, 256)
        sinks = torch.ones(sequences, hidden, dtype=HALF)
        call = lambda: ops.rms_norm_score(x, weight, 1e-5, sink=sinks, cu_seqlens=ends, backend="triton")  # noqa: E731
        call = with_settings("rms_norm_score", "hidden 4096", call, enough_programs=16)
        return call, bytes_of(x, weight, sinks, ends), bytes_of(x) + 4 * 256

    limits = {**ONCE, "requested": 1.10, "atomics": 0}
    return Case("rms_norm_score", f"packed, {sequences} sequences of 256 x {hidden}{MANY}", build, limits)


def attention(target: str, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    """With the tile of a GPU in place of the interpreter's: what is requested depends on it."""

    def build() -> tuple[Callable[[], Any], int, int]:
        selected = tokens // 3
        positions = positions_of(tokens, selected)
        q = torch.ones(1, heads, selected, head_dim, dtype=torch.float16)
        k = torch.ones(1, kv_heads, tokens, head_dim, dtype=torch.float16)
        v = torch.ones_like(k)
        seen = int(positions[0, -1]) + 1

        call = lambda: ops.sparse_query_attention(q, k, v, positions, backend="triton")  # noqa: E731
        call = with_setting("configs", "target_of", lambda device: target, call)
        call = with_setting("configs", "splits", lambda *_, **__: 1, call)
        return call, bytes_of(q, positions, k[:, :, :seen], v[:, :, :seen]), bytes_of(q)

    shape = f"{target} {tokens // 3} of {tokens:,}, {heads}/{kv_heads} heads of {head_dim}{MANY}"
    return Case("sparse_query_attention", shape, build, {**ONCE, "atomics": 0})


def few_queries(target: str, queries: int, tokens: int) -> Case:
    """Programs share the keys of a tile, and a second launch combines what each of them found."""

    def build() -> tuple[Callable[[], Any], int, int]:
        positions = torch.arange(tokens - queries, tokens, dtype=torch.int32)[None]
        q = torch.ones(1, 8, queries, 128, dtype=torch.float16)
        k = torch.ones(1, 2, tokens, 128, dtype=torch.float16)
        v = torch.ones_like(k)
        call = lambda: ops.sparse_query_attention(q, k, v, positions, backend="triton")  # noqa: E731
        call = with_setting("configs", "target_of", lambda device: target, call)
        return call, bytes_of(q, positions, k, v), bytes_of(q)

    # What the programs hand over is written and read once.
    limits = {"launches": 2, "unique": 1.2, "requested": 1.2, "atomics": 0}
    return Case("sparse_query_attention", f"{target} {queries} of {tokens:,}, 8/2 heads of 128", build, limits)


def cases() -> Iterator[Case]:
    """Every case of the report, in its order."""
    for hidden in (576, 4096):
        yield gather(hidden)
        yield scatter(hidden)
        yield scatter_add(hidden)
    yield gate(1536)
    yield gate(14336)
    yield low_rank(576, 64)
    yield low_rank(4096, 64)
    for many in (False, True):
        yield gather_add_norm(4096, many)
        yield norm_score(4096, many)
    yield norm_select(4096)
    yield norm_select_long(32768)
    yield rotary(9, 64)
    yield rotary(32, 128)
    yield kv_cache(3, 64)
    yield kv_cache(8, 128)
    for tokens, requested in ((2048, 1.0), (8192, 1.0), (32768, 5.0), (131072, 5.0)):
        yield select(tokens, requested)
    for tokens in (2048, 40_000):
        yield select_below(tokens)
    for by_threshold in (False, True):
        yield select_packed(8, 4096, by_threshold)
    yield norm_score_packed(8, 4096)
    for target in ("sm_80", "sm_90"):
        yield attention(target, 768, 8, 2, 64)
        yield attention(target, 768, 4, 1, 128)
        yield few_queries(target, 4, 4096)
