"""Workloads of the ops on rows: all of them are bound by memory, so their unit is GB/s of the bytes they have to move.

A row is ``hidden`` numbers of 2 bytes (on a CPU 4); k is a third of the tokens.
"""

from collections.abc import Callable
from typing import Any

import torch

import orthorank_kernels as ops
from benchmarks.micro.workload import LeftOut, Workload, needs, ours, random, thirds
from benchmarks.traffic.counting import bytes_of
from tests.orthorank_kernels.tools import assert_within_budget

EPS = 1e-5


def close(call: Callable[..., Any], *tensors: torch.Tensor, dtype: torch.dtype) -> Callable[[Any], None]:
    """A check against the reference: within twice its own error against float64, plus one rounding step.

    ``call(*tensors)`` runs the reference; results that are tuples are compared tensor by tensor, whole numbers exactly.
    """

    def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in ((result,) if isinstance(result, torch.Tensor) else result) if t is not None)

    def check(result: Any) -> None:
        eager = as_tuple(call(*tensors))
        exact = as_tuple(call(*(t.double() if t.is_floating_point() else t for t in tensors)))
        for got, same, best in zip(as_tuple(result), eager, exact, strict=True):
            if got.is_floating_point():
                assert_within_budget(got, same, best, dtype)
            else:
                assert torch.equal(got, same), "other tokens than the reference selects"

    return check


def gather_rows(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: k rows read, k rows written, k positions of 4 bytes."""
    x, positions = random(device, batch, tokens, hidden), thirds(device, batch, tokens)
    index = positions.long()[..., None].expand(-1, -1, hidden)
    moved = 2 * positions.numel() * hidden * x.element_size() + bytes_of(positions)
    providers = ours(device, lambda backend: ops.gather_rows(x, positions, backend=backend))
    providers["torch.gather"] = lambda: lambda: x.gather(1, index)

    def check(result: torch.Tensor) -> None:
        assert torch.equal(result, x.gather(1, index)), "other rows than torch.gather"

    return Workload("gather_rows", f"{batch} x {tokens} x {hidden}", "GB/s", moved, check, providers)


def scatter_rows(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: k rows read, k rows written, k positions of 4 bytes."""
    x, positions = random(device, batch, tokens, hidden), thirds(device, batch, tokens)
    rows = random(device, batch, tokens // 3, hidden) + 1
    index = positions.long()[..., None].expand(-1, -1, hidden)
    moved = 2 * bytes_of(rows) + bytes_of(positions)

    def call(backend: str) -> torch.Tensor:
        ops.scatter_rows_(x, positions, rows, backend=backend)
        return x

    def check(result: torch.Tensor) -> None:
        assert torch.equal(result.gather(1, index), rows), "the rows are not where they belong"

    providers = ours(device, call)
    providers["torch.scatter_"] = lambda: lambda: x.scatter_(1, index, rows)
    return Workload("scatter_rows_", f"{batch} x {tokens} x {hidden}", "GB/s", moved, check, providers)


def scatter_add_rows(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: two times k rows read, k rows written, k positions of 4 bytes."""
    x, positions = random(device, batch, tokens, hidden), thirds(device, batch, tokens)
    rows = random(device, batch, tokens // 3, hidden) + 1
    residual = rows.flip(1)
    index = positions.long()[..., None].expand(-1, -1, hidden)

    def call(backend: str) -> torch.Tensor:
        ops.scatter_add_rows_(x, positions, rows, residual, backend=backend)
        return x

    def check(result: torch.Tensor) -> None:
        eager, exact = residual + rows, residual.double() + rows.double()
        assert_within_budget(result.gather(1, index), eager, exact, x.dtype)

    providers = ours(device, call)
    providers["add, torch.scatter_"] = lambda: lambda: x.scatter_(1, index, residual + rows)
    moved = 3 * bytes_of(rows) + bytes_of(positions)
    return Workload("scatter_add_rows_", f"{batch} x {tokens} x {hidden}", "GB/s", moved, check, providers)


def silu_and_mul(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: two halves of k rows read, k rows written; an MLP is here 3 times as wide as the hidden states."""
    merged = random(device, batch, tokens // 3, 6 * hidden)

    def call(backend: str) -> torch.Tensor:
        return ops.silu_and_mul(merged, backend=backend)

    check = close(lambda merged: ops.silu_and_mul(merged, backend="torch"), merged, dtype=merged.dtype)
    shape = f"{batch} x {tokens // 3} x {3 * hidden}"
    return Workload("silu_and_mul", shape, "GB/s", 1.5 * bytes_of(merged), check, ours(device, call))


def add_low_rank(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: every row of the hidden states read and written, low-rank states of rank 64 and the map read."""
    rank = 64
    x, low = random(device, batch, tokens, hidden), random(device, batch, tokens, rank)
    up, bias = random(device, hidden, rank), random(device, hidden)
    moved = 2 * bytes_of(x) + bytes_of(low, up, bias)

    def call(backend: str) -> Any:
        return ops.add_low_rank(x, low, up, bias, backend=backend)

    def reference(*tensors: torch.Tensor) -> Any:
        return ops.add_low_rank(*tensors, backend="torch")

    check = close(reference, x, low, up, bias, dtype=x.dtype)
    shape = f"{batch} x {tokens} x {hidden}, rank {rank}"
    return Workload("add_low_rank", shape, "GB/s", moved, check, ours(device, call))


def gather_add_rms_norm(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: k rows of the hidden states and of the addend read, two results of k rows written, weight, positions."""
    x, positions = random(device, batch, tokens, hidden), thirds(device, batch, tokens)
    rows, weight = random(device, batch, tokens // 3, hidden), random(device, hidden)
    moved = 4 * bytes_of(rows) + bytes_of(positions, weight)

    def call(backend: str) -> Any:
        return ops.gather_add_rms_norm(x, positions, rows, weight, EPS, backend=backend)

    def reference(x: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> Any:
        return ops.gather_add_rms_norm(x, positions, rows, weight, EPS, backend="torch")

    check = close(reference, x, positions, rows, weight, dtype=x.dtype)
    shape = f"{batch} x {tokens} x {hidden}"
    return Workload("gather_add_rms_norm", shape, "GB/s", moved, check, ours(device, call))


def apply_rotary_at(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: k rows read and written, half of cos and sin of k tokens, positions. Heads of 64."""
    positions, selected = thirds(device, batch, tokens), tokens // 3
    x = random(device, batch, selected, hidden // 64, 64).transpose(1, 2)
    angles = random(device, 1, tokens, 32, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    moved = 2 * bytes_of(x) + batch * selected * 64 * x.element_size() + bytes_of(positions)

    def call(backend: str) -> Any:
        return ops.apply_rotary_at(x, cos, sin, positions, backend=backend)

    def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Any:
        return ops.apply_rotary_at(x, cos, sin, positions, backend="torch")

    check = close(reference, x, cos, sin, positions, dtype=x.dtype)
    shape = f"{batch} x {selected} x {hidden // 64} x 64"
    return Workload("apply_rotary_at", shape, "GB/s", moved, check, ours(device, call))


def apply_rotary_and_cache(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: keys and values of all tokens read and written, their angles, slots and positions.

    A third as many heads of 64 as queries have, in pages of 16.
    """
    total, kv_heads = batch * tokens, max(1, hidden // 64 // 3)
    keys, values = random(device, total, 2 * kv_heads, 64).split(kv_heads, 1)
    k_cache, v_cache = random(device, -(-total // 16), kv_heads, 16, 128).transpose(1, 2).split(64, -1)
    angles, slots = random(device, tokens, 32, dtype=torch.float32), torch.randperm(total).to(device)
    cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
    positions, at = torch.arange(total).to(device) % tokens, (slots // 16, slots % 16)
    moved = 4 * bytes_of(keys) + total * 64 * keys.element_size() + bytes_of(slots, positions)

    def call(backend: str) -> Any:
        ops.apply_rotary_and_cache_(
            k_cache, v_cache, slots, keys, values, cos, sin, positions, rotary_dim=64, backend=backend
        )
        return k_cache, v_cache

    def by_index() -> Any:
        k_cache[at], v_cache[at] = ops.apply_rotary_at(keys, cos, sin, rows, rotary_dim=64), values
        return k_cache, v_cache

    def reference(keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return ops.apply_rotary_at(keys, cos, sin, rows, rotary_dim=64, backend="torch"), values

    def check(result: Any) -> None:
        close(reference, keys, values, cos, sin, dtype=keys.dtype)(tuple(cache[at] for cache in result))

    rows, providers = positions.int(), ours(device, call)
    providers["rotary, write by index"] = lambda: by_index
    return Workload("apply_rotary_and_cache_", f"{total} x {kv_heads} x 64", "GB/s", moved, check, providers)


def rms_norm_score(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: every row read and written, the weight, and a score of 4 bytes for each row."""
    x, weight = random(device, batch, tokens, hidden), random(device, hidden)
    moved = 2 * bytes_of(x) + bytes_of(weight) + 4 * batch * tokens

    def call(backend: str) -> Any:
        return tuple(ops.rms_norm_score(x, weight, EPS, backend=backend))[:2]

    def liger() -> Callable[[], Any]:
        needs("liger_kernel", device, "Liger-Kernel")
        from liger_kernel.ops.rms_norm import rms_norm_forward

        return lambda: rms_norm_forward(x, weight, EPS, 0.0, "llama", None)[0]

    def check(result: Any) -> None:
        normed, *scores = (result,) if isinstance(result, torch.Tensor) else result
        check_norm_score(x, weight, normed, *scores)

    providers = {**ours(device, call), "Liger-Kernel, no score": liger}
    shape = f"{batch} x {tokens} x {hidden}"
    return Workload("rms_norm_score", shape, "GB/s", moved, check, providers)


def check_norm_score(
    x: torch.Tensor, weight: torch.Tensor, normed: torch.Tensor, scores: torch.Tensor | None = None
) -> None:
    """The norm, and the scores if there are any, are as near to float64 as the reference."""
    eager = ops.rms_norm_score(x, weight, EPS, backend="torch")
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS) * weight.double()
    assert_within_budget(normed, eager.normed, exact, x.dtype)
    if scores is not None:
        assert_within_budget(scores, eager.scores, (exact * exact[:, :1]).sum(-1).abs(), x.dtype)


def rms_norm_select(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: those of rms_norm_score, the scores read again, k positions and a count."""
    x, weight, k = random(device, batch, tokens, hidden), random(device, hidden), tokens // 3
    moved = 2 * bytes_of(x) + bytes_of(weight) + 8 * batch * tokens + 4 * batch * (k + 1)

    def call(backend: str) -> Any:
        result = ops.rms_norm_select(x, weight, EPS, k, backend=backend)
        return result.normed, result.scores, result.positions

    def check(result: tuple[torch.Tensor, ...]) -> None:
        normed, scores, positions = result
        check_norm_score(x, weight, normed, scores)
        chosen = ops.select_tokens(scores, k, backend="torch").positions
        assert torch.equal(positions, chosen), "other tokens than the smallest scores"

    shape = f"{batch} x {tokens} x {hidden}"
    return Workload("rms_norm_select", shape, "GB/s", moved, check, ours(device, call))


def select_tokens(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: the scores of 4 bytes read once, k positions and a count written. ``hidden`` plays no part."""
    scores, k = random(device, batch, tokens, dtype=torch.float32).abs(), tokens // 3
    scores[:, 0] = torch.inf  # the sink, so that every provider leaves it out
    expected = scores.topk(k, largest=False).indices.sort().values.to(torch.int32)

    def call(backend: str) -> torch.Tensor:
        return ops.select_tokens(scores, k, backend=backend).positions

    def flag_gems() -> Callable[[], Any]:
        needs("flag_gems", device, "FlagGems")
        if k > 8192:
            raise LeftOut("FlagGems sorts k in the registers of one program: it does not compile for so many")
        from flag_gems.ops.topk import topk

        return lambda: topk(scores, k, largest=False)[1].sort().values.to(torch.int32)

    def check(result: torch.Tensor) -> None:
        assert torch.equal(result, expected), "other tokens than torch.topk and sort"

    providers = ours(device, call)
    providers["torch.topk + sort"] = lambda: lambda: scores.topk(k, largest=False).indices.sort().values.int()
    providers["FlagGems topk + sort"] = flag_gems
    moved = bytes_of(scores) + 4 * batch * (k + 1)
    return Workload("select_tokens", f"{batch} x {tokens}", "GB/s", moved, check, providers)


def select_largest(device: torch.device, batch: int, tokens: int, hidden: int) -> Workload:
    """Bytes: as `select_tokens`, of 64 rows with 16 scores for each token, of which an indexer takes up to 2,048."""
    rows, columns = 64 * batch, 16 * tokens
    scores, k = random(device, rows, columns, dtype=torch.float32), min(2048, columns // 4)
    expected = scores.topk(k).indices.sort().values.to(torch.int32)

    def call(backend: str) -> torch.Tensor:
        return ops.select_tokens(scores, k, largest=True, backend=backend).positions

    def check(result: torch.Tensor) -> None:
        assert torch.equal(result.sort().values.int(), expected), "other columns than torch.topk"

    providers = ours(device, call)
    providers["torch.topk, unordered"] = lambda: lambda: scores.topk(k, sorted=False).indices
    moved = bytes_of(scores) + 4 * rows * (k + 1)
    return Workload("select_tokens", f"{k} largest of {rows} x {columns}", "GB/s", moved, check, providers)
