"""Attention of selected queries over a paged cache in PyTorch.

Key j of sequence s is ``k_cache[block_table[t, j // block_size], j % block_size]`` with ``t = table_rows[s]``, or s.
Entries of the block table past a sequence's last key, and the cache's slots past it, are never read. Values of a scaled
cache are multiplied by ``k_scale`` or ``v_scale`` and rounded to the dtype of q. Scores, options and results are those
of `orthorank_kernels.pytorch.attention`.

Where values may not be read (see there), every query meets all keys of every sequence's row of the block table.
"""

from collections.abc import Callable

import torch

from orthorank_kernels.pytorch.attention import Options, Pair, attend, joined, may_read, nothing, rotated, visible
from orthorank_kernels.pytorch.attention_varlen import owners, parts, unbatched

Read = Callable[[torch.Tensor], Pair]


def sparse_query_attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    cu_selected: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
    max_seqlen_k: int | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    return_lse: bool,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Pair:
    """See `orthorank_kernels.sparse_query_attention_paged`; arguments are taken as checked."""
    q = rotated(q, positions, rotary_cos, rotary_sin, rotary_interleaved, rotary_dim)
    options = Options(scale, softcap, sinks, return_lse)
    rows, block_size = q.transpose(0, 1)[None], k_cache.shape[1]
    if q.numel() == 0 or k_cache.numel() == 0 or block_table.numel() == 0 or seq_lens.shape[0] == 0:
        return unbatched(nothing(rows, return_lse))
    sequence, owned = owners(cu_selected, q.shape[0])
    first, end = visible(positions[None], seq_lens[sequence][None], window, None)
    end = end.masked_fill(~owned, 0)
    tables = block_table  # [seqs, max_blocks]
    if table_rows is not None:  # of a sequence without queries it may be anything
        tables = block_table[table_rows.clamp(0, block_table.shape[0] - 1)]

    def read(pages: torch.Tensor) -> Pair:
        """Keys and values of these pages, each ``[1, kv_heads, keys, head_dim]``."""
        k, v = (_indexed(cache, pages).flatten(0, 1) for cache in (k_cache, v_cache))
        return _dequantised(k, k_scale, q.dtype), _dequantised(v, v_scale, q.dtype)

    if not may_read(positions, cu_selected, block_table, seq_lens):
        pages = tables.shape[1] if max_seqlen_k is None else min(tables.shape[1], -(-max_seqlen_k // block_size))
        every = _every_query(rows, first, end, sequence, tables[:, :pages], seq_lens, block_size, read, options)
        return unbatched(every)
    results = []
    for s, part in enumerate(parts(cu_selected)):

        def fetch(keys: slice, table: torch.Tensor = tables[s]) -> Pair:
            page = keys.start // block_size
            k, v = read(table[page : -(-keys.stop // block_size)])
            within = slice(keys.start - page * block_size, keys.stop - page * block_size)
            return k[:, :, within], v[:, :, within]

        of = rows[:, :, part], first[:, part], end[:, part]
        results.append(attend(*of, 0, fetch, options, below=window is not None, reads=True))
    results.append(nothing(rows[:, :, int(cu_selected[-1]) :], return_lse))
    return unbatched(joined(results, 1))


def _indexed(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """``cache[pages]``; of float8 as bytes, since torch 2.6 has no index of it."""
    if cache.dtype.itemsize == 1:
        return cache.view(torch.uint8)[pages].view(cache.dtype)
    return cache[pages]


def _every_query(
    q: torch.Tensor,
    first: torch.Tensor,
    end: torch.Tensor,
    sequence: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    read: Read,
    options: Options,
) -> Pair:
    """Each sequence's keys with all queries, of which only the sequence's own see any; the sum over sequences."""
    key = torch.arange(tables.shape[1] * block_size, device=q.device)
    out, lse = nothing(q, options.return_lse)
    for s in range(tables.shape[0]):
        holds = key < seq_lens[s]
        needed = tables[s].masked_fill(~holds[::block_size], 0)
        k, v = (x.masked_fill(~holds[:, None], 0) for x in read(needed))

        def fetch(keys: slice, k: torch.Tensor = k, v: torch.Tensor = v) -> Pair:
            return k[:, :, keys], v[:, :, keys]

        mine = sequence == s
        own_end = end.masked_fill(~mine, 0)
        part, part_lse = attend(q, first, own_end, key.shape[0], fetch, options, below=True, reads=False)
        out = out + part
        lse = torch.where(mine[:, None], part_lse, lse) if options.return_lse else lse
    return out, lse


def _dequantised(x: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Values ``[keys, kv_heads, head_dim]`` of the cache in ``dtype``: ``[1, kv_heads, keys, head_dim]``."""
    if factor is not None:
        wide = torch.promote_types(dtype, torch.float32)
        x = x.to(wide) * factor.to(wide)[:, None]
    return x.to(dtype).transpose(0, 1)[None]
