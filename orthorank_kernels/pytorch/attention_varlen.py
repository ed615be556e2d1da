"""Attention of selected queries over packed keys in PyTorch.

Sequence s owns the queries ``cu_selected[s] .. cu_selected[s + 1]`` and the keys ``cu_seqlens_k[s] ..
cu_seqlens_k[s + 1]``; its positions count from its first key. Scores, options and results are those of
`orthorank_kernels.pytorch.attention`.
"""

from itertools import pairwise

import torch

from orthorank_kernels.pytorch.attention import Options, Pair, attend, joined, may_read, nothing, rotated, visible


def sparse_query_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Pair:
    """See `orthorank_kernels.sparse_query_attention_varlen`; arguments are taken as checked."""
    q = rotated(q, positions, rotary_cos, rotary_sin, rotary_interleaved, rotary_dim)
    options = Options(scale, softcap, sinks, return_lse)
    rows, keys, values = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if q.numel() == 0 or k.shape[0] == 0 or cu_selected.shape[0] == 1:
        return unbatched(nothing(rows, return_lse))
    sequence, owned = owners(cu_selected, q.shape[0])
    start = cu_seqlens_k[sequence]
    first, end = visible(positions[None], (cu_seqlens_k[sequence + 1] - start)[None], window, None)
    first, end = first + start, (end + start).masked_fill(~owned, 0)

    def fetch(part: slice) -> Pair:
        return keys[:, :, part], values[:, :, part]

    if not may_read(positions, cu_selected, cu_seqlens_k):
        return unbatched(attend(rows, first, end, k.shape[0], fetch, options, below=True, reads=False))
    results = []
    for part in parts(cu_selected):
        of = rows[:, :, part], first[:, part], end[:, part]
        results.append(attend(*of, k.shape[0], fetch, options, below=window is not None, reads=True))
    results.append(nothing(rows[:, :, int(cu_selected[-1]) :], return_lse))
    return unbatched(joined(results, 1))


def owners(cu_selected: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each query (past the last selected one: some sequence), and whether it has one: [queries]."""
    index = torch.arange(queries, device=cu_selected.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_selected[1:].contiguous(), index, right=True)
    return sequence.clamp(max=cu_selected.shape[0] - 2), index < cu_selected[-1]


def parts(cu_selected: torch.Tensor) -> list[slice]:
    """The queries of each sequence; reads values."""
    return [slice(begin, end) for begin, end in pairwise(cu_selected.tolist())]


def unbatched(result: Pair) -> Pair:
    """The result of a batch of one without its batch dimension."""
    out, lse = result
    return out[0], lse[0] if lse.dim() == 3 else lse
