"""Attention of selected queries: flash attention in which every query brings its own position. The launchers.

    out[i] = softmax(scale * q[i] k[first..p]^T) v[first..p],   p = positions[i] + query_offset

One kernel (`attention_kernel.py`) for keys in a batch, packed keys and keys in pages; `attention_tiles.py` says which
queries and keys a program has, `attention_step.py` is what it does with a block of keys, `attention_combine.py` joins
keys that were split, `attention_launch.py` launches both. Not here: a backward pass, float64. `hopper/` has a kernel
for sm_90 alone, which runs where ``ORTHORANK_ATTENTION=hopper`` asks for it.

DESIGN. All figures are of compiled code (bfloat16, Triton 3.9); none is a time. "ntm" is instructions that are not
matrix products, for each million operations of those: below 977 on an H100 and 1953 on an A100, issuing instructions is
not the bound.

Work. A query at position p needs 4 * head_dim * (p + 1) operations for each head. Selecting a third of the tokens costs
a third of dense attention, if nothing is computed in vain: tiles hold 32 neighbouring selected queries of about 96
tokens and the four heads of a group, so K and V are read once for the group, and computed pairs are 1.098 times the
needed ones at 2048 tokens and 1.007 at 32768 (`benchmarks/static/pairs.py`; one head alone 1.25 and 1.015). K and V
come from the L2 cache at 1 / BLOCK_M bytes for each operation: 3.5 TB/s on an H100 at full speed with 128 rows, 7 with
64.

No mask but at the end. A tile's lowest and highest position split its keys into blocks that every query sees whole and
the two or three blocks behind them. Those are masked by comparing, and clamped: rows past the highest position are
never read, loads keep their 128 bits, and lengths are no part of what is compiled. The tile with the most keys runs
first, of all heads and batch rows whose keys and values the L2 cache holds, then the next tile of each
(`attention_tiles.find_work`); packed, a program counts the tiles of the sequences to find its own. By a simulation
(`benchmarks/bench_work_order.py`) an H100 with 8 groups of 4 heads is busy 77 % of the time at 2048 tokens, where it
was 60 head by head, 90 at 4096 (74), 98 at 8192 (88). The
tile that is not full is the one with the fewest keys (filled from the front it was 1.172, not 1.098).

    registers, spills, ntm, ntm with mask      sm_80                  sm_90
    head_dim 64, batch                         234, 0,  854, 1131     170, 0,  879, 1106
    head_dim 128, batch                        207, 0,  648,  807     208, 0,  482,  617
    head_dim 128, packed                       210, 0,  652,  807     212, 0,  483,  616
    head_dim 128, packed, window               230, 0,  647,  948     222, 0,  482,  753
    head_dim 128, pages of 16                  206, 0,  734,  950     238, 0,  560,  763
    head_dim 128, pages of 128                 203, 0,  719,  881     229, 0,  521,  698
    head_dim 128, soft-capping                 207, 0,  912, 1108     250, 0,  736,  920
    head_dim 128, rotary                       207, 0,  648,  807     202, 0,  503,  649
    head_dim 128, rotary, interleaved          244, 0,  633,  790     247, 0,  486,  627
    head_dim 128, e4m3 in pages of 16          200, 0, 3687, 3986     223, 0,  745,  897
    head_dim 128, e5m2 in pages of 16          206, 0, 2209, 2502     224, 0,  564,  714

Pages take a pointer for each row, where batch and packed keys on sm_90 have one descriptor for the block. A page that
holds whole blocks is one base pointer and runs like a batch. Page numbers are compared with the cache's, so that no
table makes a launch read outside it: this costs nothing (an unsigned number saves the sign's extension; 579 without).
Soft-capping is a hyperbolic tangent, through an exponential and a reciprocal: four instructions for each score, since
the largest score is found before it and the last subtraction is part of a product. Two of the four are of the unit that
takes 16 a cycle, with the softmax's own three for a score, which on sm_90 take 1.5 times as long as its products at
head_dim 128. `tanh.approx` would save one, with errors of 2^-11: of softcap 50 that is 0.024 in a score and 2.4 % in a
weight, six times what rounding weights to bfloat16 does, so it is not taken for any dtype. fp8 numbers become float16
by shifting bits, four in a register: on sm_80 each warp converts the whole block, and it is the reads of a long decode
that fp8 halves. Keys' scales go into the softmax's scale, values' into the output.

Rotary. Queries are rotated where they are read: on sm_90 957 instructions of a warp before the first key, as many as
1.9 blocks of keys take. The product with keys then has them from registers there, which is its 21 instructions more:
the compiler leaves in shared memory only what comes from a load as it is.

Few queries. Where a third of the GPU would be idle, the keys of a tile are split over programs, as many as make one
wave (`configs.splits`, from shapes alone), and tiles of 16 or 64 rows take 4 warps: the bound is then the
reading of K and V. Results do not depend on the order of programs, but the number of splits, and so the rounding, does
depend on the batch's size.

What was tried, and lost: `docs/writing-kernels.md`.
"""

import torch

from orthorank_kernels.triton.attention_launch import Outputs, Rotary, launch
from orthorank_kernels.triton.configs import cdiv


def sparse_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    query_offset: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_dim: int | None = None,
    *,
    out: Outputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention`. Arguments are taken as checked."""
    batch, heads, selected, head_dim = q.shape
    if out is None:
        made = torch.empty(batch, selected, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
        lse = torch.empty(batch, heads, selected, dtype=torch.float32, device=q.device) if return_lse else None
        out = (made, lse)
    launch(
        q, k, v, positions, out, rows=selected, longest=k.shape[2], scale=scale, window=window, softcap=softcap,
        sinks=sinks, starts=starts, query_offset=query_offset,
        rotary=(rotary_cos, rotary_sin, rotary_interleaved, rotary_dim),
    )  # fmt: skip
    return _returned(out)


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
    *,
    out: Outputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention_varlen`. Arguments are taken as checked."""
    out = out or _packed_outputs(q, return_lse)
    longest = k.shape[0] if max_seqlen_k is None else min(k.shape[0], max_seqlen_k)
    launch(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), positions.unsqueeze(0), _batch_of_one(out),
        cu_selected=cu_selected, cu_keys=cu_seqlens_k, rows=_rows_of_a_sequence(q, cu_selected), longest=longest,
        scale=scale, window=window, softcap=softcap, sinks=sinks,
        rotary=_one_table(rotary_cos, rotary_sin, rotary_interleaved, rotary_dim),
    )  # fmt: skip
    return _returned(out)


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
    *,
    out: Outputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention_paged`. Arguments are taken as checked."""
    out = out or _packed_outputs(q, return_lse)
    capacity = block_table.shape[1] * k_cache.shape[1]
    launch(
        q.transpose(0, 1).unsqueeze(0), k_cache.transpose(1, 2), v_cache.transpose(1, 2), positions.unsqueeze(0),
        _batch_of_one(out), cu_selected=cu_selected, seq_lens=seq_lens, block_table=block_table, table_rows=table_rows,
        k_scale=k_scale, v_scale=v_scale, rows=_rows_of_a_sequence(q, cu_selected), scale=scale, window=window,
        longest=capacity if max_seqlen_k is None else min(capacity, max_seqlen_k), softcap=softcap, sinks=sinks,
        rotary=_one_table(rotary_cos, rotary_sin, rotary_interleaved, rotary_dim),
    )  # fmt: skip
    return _returned(out)


def _packed_outputs(q: torch.Tensor, return_lse: bool) -> Outputs:
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _one_table(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool, rotary_dim: int | None) -> Rotary:
    """Tables ``[tokens, width]`` as those of a batch of one."""
    cos, sin = (None if table is None else table.unsqueeze(0) for table in (cos, sin))
    return cos, sin, interleaved, rotary_dim


def _batch_of_one(out: Outputs) -> Outputs:
    """Packed outputs, ``[selected, heads, head_dim]`` and ``[selected, heads]``, as those of a batch."""
    return out[0].transpose(0, 1).unsqueeze(0), None if out[1] is None else out[1].transpose(0, 1).unsqueeze(0)


def _returned(out: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator has no optional results: an empty one where there is no log-sum-exp."""
    return out[0], out[0].new_empty(0, dtype=torch.float32) if out[1] is None else out[1]


def _rows_of_a_sequence(q: torch.Tensor, cu_selected: torch.Tensor) -> int:
    return cdiv(q.shape[0], max(1, cu_selected.shape[0] - 1))
