"""What the tests of the attention kernel share: sequences, their three layouts, and the definition written out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from orthorank_kernels.triton import attention
from tests.orthorank_kernels.tools import DEVICE, budget, poisoned_outputs

Result = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Sequences:
    """Queries ``[n, heads, dim]``, positions ``[n]`` and keys and values ``[keys, kv_heads, dim]`` of each sequence."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    positions: list[torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cu_selected(self) -> torch.Tensor:
        return ends([len(p) for p in self.positions])

    @property
    def cu_keys(self) -> torch.Tensor:
        return ends([len(k) for k in self.k])


def ends(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def some(
    lengths: Sequence[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Sequences:
    """Sequences of (selected, keys)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE, dtype)

    q = [normal(n, heads[0], dim) for n, _ in lengths]
    k = [normal(keys, heads[1], dim) for _, keys in lengths]
    v = [normal(keys, heads[1], dim) for _, keys in lengths]
    positions = [torch.randperm(keys, generator=random)[:n].sort().values.int().to(DEVICE) for n, keys in lengths]
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads[0], generator=random).to(DEVICE) * 2
    return Sequences(q, k, v, positions, options)


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    dtype: torch.dtype,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Result:
    """The definition for one sequence, every score at once, in ``dtype``: out [n, heads, dim] and lse [n, heads]."""
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    at, key = positions.long()[:, None], torch.arange(k.shape[1], device=q.device)
    seen = (key <= at) & (at >= 0)
    if window is not None:
        seen &= at - key < window
    scores = (q @ k.mT).to(torch.promote_types(dtype, torch.float32)) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:2], float("-inf"))
    weights = (scores - lse[..., None]).exp()[..., : k.shape[1]].to(dtype)
    blind = ~seen.any(-1)
    out = (weights.nan_to_num() @ v).masked_fill(blind[:, None], 0.0)
    return out.transpose(0, 1), lse.masked_fill(blind, float("-inf")).transpose(0, 1)


def expected(sequences: Sequences, dtype: torch.dtype) -> Result:
    """Of all sequences, packed."""
    parts = zip(sequences.q, sequences.k, sequences.v, sequences.positions, strict=True)
    outs, lses = zip(*(written_out(*part, dtype, **sequences.options) for part in parts), strict=True)
    return torch.cat(outs), torch.cat(lses)


def arguments(sequences: Sequences) -> tuple[float, int | None, float | None, torch.Tensor | None]:
    """Scale, window, softcap and sinks."""
    options = sequences.options
    scale = options.get("scale") or sequences.q[0].shape[-1] ** -0.5
    return scale, options.get("window"), options.get("softcap"), options.get("sinks")


def run_batch(sequences: Sequences) -> Result:
    """Each sequence as a batch row of its own, all in one call; rows are padded with queries at -1 and NaN keys."""

    def padded(rows: list[torch.Tensor], fill: float) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    q, k, v = (padded(x, float("nan")).transpose(1, 2) for x in (sequences.q, sequences.k, sequences.v))
    positions = padded(sequences.positions, -1)
    scale, window, softcap, sinks = arguments(sequences)
    q = q.nan_to_num()
    out, lse = attention.sparse_query_attention(q, k, v, positions, scale, window, None, 0, softcap, sinks, True)
    unused = positions < 0
    assert (out.transpose(1, 2)[unused] == 0).all()
    assert (lse.transpose(1, 2)[unused] == float("-inf")).all()
    return out.transpose(1, 2)[~unused], lse.transpose(1, 2)[~unused]


def run_varlen(sequences: Sequences, beyond: int = 5, max_seqlen_k: int | None = None) -> Result:
    """All sequences packed, and ``beyond`` queries past the last."""
    q = torch.cat([*sequences.q, torch.ones_like(sequences.q[0][:1]).expand(beyond, -1, -1)])
    positions = torch.cat([*sequences.positions, torch.full((beyond,), 3, dtype=torch.int32, device=DEVICE)])
    k, v = torch.cat(sequences.k), torch.cat(sequences.v)
    out, lse = attention.sparse_query_attention_varlen(
        q, k, v, positions, sequences.cu_selected, sequences.cu_keys, max_seqlen_k, *arguments(sequences), True
    )
    n = len(q) - beyond
    assert (out[n:] == 0).all()
    assert (lse[n:] == float("-inf")).all()
    return out[:n], lse[:n]


def pages(
    sequences: Sequences, block_size: int, *, spare: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k_cache, v_cache, block_table and seq_lens: pages in random order, NaN where no key is, and wrong pages in the
    table where none is needed."""
    lens = [len(k) for k in sequences.k]
    counts = [-(-n // block_size) for n in lens]
    total, widest = sum(counts) + spare, max(counts) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    table = torch.full((len(lens), widest), 2**30, dtype=torch.int32, device=DEVICE)
    caches = []
    for source in (sequences.k, sequences.v):
        cache = source[0].new_full((total, block_size, *source[0].shape[1:]), float("nan"))
        begin = 0
        for s, (x, count) in enumerate(zip(source, counts, strict=True)):
            mine = order[begin : begin + count]
            table[s, :count] = mine.int()
            filled = x.new_full((count * block_size, *x.shape[1:]), float("nan"))
            filled[: len(x)] = x
            cache[mine] = filled.unflatten(0, (count, block_size))
            begin += count
        caches.append(cache)
    return caches[0], caches[1], table, torch.tensor(lens, dtype=torch.int32, device=DEVICE)


def run_paged(
    sequences: Sequences,
    block_size: int = 16,
    view: Callable[[torch.Tensor], torch.Tensor] = lambda cache: cache,
    beyond: int = 5,
    max_seqlen_k: int | None = None,
) -> Result:
    """All sequences packed over pages; ``view`` gives a cache other strides."""
    q = torch.cat([*sequences.q, torch.ones_like(sequences.q[0][:1]).expand(beyond, -1, -1)])
    positions = torch.cat([*sequences.positions, torch.full((beyond,), 3, dtype=torch.int32, device=DEVICE)])
    k, v, table, lens = pages(sequences, block_size)
    out, lse = attention.sparse_query_attention_paged(
        q, view(k), view(v), positions, sequences.cu_selected, table, lens, None, max_seqlen_k,
        *arguments(sequences), None, None, True,
    )  # fmt: skip
    n = len(q) - beyond
    assert (out[n:] == 0).all()
    assert (lse[n:] == float("-inf")).all()
    return out[:n], lse[:n]


LAYOUTS: dict[str, Callable[[Sequences], Result]] = {"batch": run_batch, "varlen": run_varlen, "paged": run_paged}


def check(sequences: Sequences, run: Callable[[Sequences], Result]) -> Result:
    """Run a layout on poisoned memory and compare with the definition."""
    with poisoned_outputs():
        out, lse = run(sequences)
    dtype = sequences.q[0].dtype
    exact, eager = expected(sequences, torch.float64), expected(sequences, dtype)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # tanh through an exponential is exact to a step of float32 at 1, which the cap multiplies.
    capped = sequences.options.get("softcap") or 0.0
    if not out.numel():
        return out, lse
    allowed = budget(eager[0], exact[0], dtype) + capped * 2.0**-22 * exact[0].abs().max()
    assert ((out.double() - exact[0]).abs() <= allowed).all(), (out.double() - exact[0]).abs().max()
    blind = exact[1].isinf()
    assert torch.equal(lse.isinf(), blind)
    allowed = 2 * (eager[1].double() - exact[1])[~blind].abs() + 4e-6 + capped * 2.0**-22
    assert ((lse.double() - exact[1])[~blind].abs() <= allowed).all(), "log-sum-exp"
    return out, lse
