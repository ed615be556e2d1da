"""Attention inputs in every layout, and the definition of attention as a loop over queries in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tests.orthorank_kernels.tools import DEVICE, assert_within_budget

FP8 = torch.float8_e4m3fn


def stated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: int,
    *,
    start: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query: q ``[heads, head_dim]`` over keys ``[keys, kv_heads, head_dim]``; (out, lse ``[heads]``)."""
    first = start if window is None else max(start, position - window + 1)
    q, k, v = (x.double() for x in (q, k[first : position + 1], v[first : position + 1]))
    if position < 0 or k.shape[0] == 0:
        return torch.zeros_like(q), torch.full_like(q[:, 0], float("-inf"))
    group = q.shape[0] // k.shape[1]
    logits = torch.einsum("hd,jhd->hj", q, k.repeat_interleave(group, 1))
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    denominator = logits.exp().sum(-1)
    if sinks is not None:
        denominator = denominator + sinks.double().exp()
    out = torch.einsum("hj,jhd->hd", logits.exp() / denominator[:, None], v.repeat_interleave(group, 1))
    return out, denominator.log()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def integers(values: Sequence[int] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(DEVICE)


def cumulative(counts: Sequence[int]) -> torch.Tensor:
    return integers([0, *torch.tensor(counts, dtype=torch.long).cumsum(0).tolist()])


class Packed(NamedTuple):
    """The tensors of the varlen op, in its order, and the numbers they were made from."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    cu_selected: torch.Tensor
    cu_seqlens_k: torch.Tensor
    lengths: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[:6]


def packed(
    lengths: Sequence[int],
    counts: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    tail: int = 0,
    seed: int = 0,
) -> Packed:
    """Sequences of these lengths with so many selected tokens each, and ``tail`` queries that belong to none."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(n, generator=generator)[:m].sort().values for n, m in zip(lengths, counts, strict=True)]
    positions = integers(torch.cat([*chosen, torch.full((tail,), -1)]))
    q = random(positions.shape[0], heads[0], dim, dtype=dtype, seed=seed + 1)
    k, v = (random(sum(lengths), heads[1], dim, dtype=dtype, seed=seed + i) for i in (2, 3))
    assert positions.shape[0] == sum(counts) + tail, "a sequence has fewer tokens than it selects"
    return Packed(q, k, v, positions, cumulative(counts), cumulative(lengths), tuple(lengths), tuple(counts))


def stated_packed(case: Packed, max_seqlen_k: int | None = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition for every query of packed sequences; (out ``[n, heads, head_dim]``, lse ``[n, heads]``)."""
    out = torch.zeros(case.q.shape, dtype=torch.float64, device=case.q.device)
    lse = torch.full(case.q.shape[:2], float("-inf"), dtype=torch.float64, device=case.q.device)
    query, key = 0, 0
    for length, count in zip(case.lengths, case.counts, strict=True):
        keys, values = case.k[key : key + length], case.v[key : key + length]
        for i in range(query, query + count):
            out[i], lse[i] = stated(case.q[i], keys, values, int(case.positions[i]), **options)
        query, key = query + count, key + length
    return out, lse


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},
    torch.float16: {"rtol": 4e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 1e-2},
}


def assert_right(
    run: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
    exact: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    backend: str,
    lse_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``run(backend)`` gives (out, lse) as `exact`: the reference by tolerance, a kernel by the error budget.

    Sums are in float32 or wider, so the lse is as good as that, unless keys are rounded (``lse_dtype``). Returns out.
    """
    out, lse = run(backend)
    blind = exact[1] == float("-inf")
    assert torch.equal(lse == float("-inf"), blind), "lse is -inf exactly where no key is seen"
    assert lse.dtype == torch.float32
    assert out.dtype == dtype
    seen = torch.where(blind, 0.0, lse)
    exact_seen = exact[1].masked_fill(blind, 0.0)
    if backend == "torch":
        torch.testing.assert_close(out.double(), exact[0], **TOLERANCE[dtype])
        torch.testing.assert_close(seen.double(), exact_seen, **TOLERANCE[lse_dtype])
    else:
        eager, eager_lse = run("torch")
        assert_within_budget(out, eager, exact[0], dtype, "out", steps=8 if dtype == torch.float32 else 0)
        eager_seen = torch.where(blind, 0.0, eager_lse)
        assert_within_budget(seen, eager_seen, exact_seen, lse_dtype, "lse")
    assert (out[exact[0] == 0] == 0).all(), "a query without keys must give exactly 0"
    return out
