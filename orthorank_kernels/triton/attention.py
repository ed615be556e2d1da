"""Attention of selected queries: flash attention in which every query brings its own position. The launchers.

    out[i] = softmax(scale * q[i] k[first..p]^T) v[first..p],   p = positions[i] + query_offset

One kernel (`attention_kernel.py`) for keys in a batch, packed keys and keys in pages; `attention_tiles.py` says which
queries and keys a program has, `attention_step.py` is what it does with a block of keys, `attention_combine.py` joins
keys that were split. Not here: a backward pass, float64.

DESIGN. All figures are of compiled code (bfloat16, Triton 3.9); none is a time. "ntm" is instructions that are not
matrix products, for each million operations of those: below 977 on an H100 and 1953 on an A100 issuing is not the bound.

Work. A query at position p needs 4 * head_dim * (p + 1) operations for each head. Selecting a third of the tokens costs
a third of dense attention, if nothing is computed in vain: tiles hold 32 neighbouring selected queries of about 96
tokens and the four heads of a group, so K and V are read once for the group, and computed pairs are 1.098 times the
needed ones at 2048 tokens and 1.007 at 32768 (`benchmarks/static/pairs.py`; one head alone 1.25 and 1.015). K and V come
from the L2 cache at 1 / BLOCK_M bytes for each operation: 3.5 TB/s on an H100 at full speed with 128 rows, 7 with 64.

No mask but at the end. A tile's lowest and highest position split its keys into blocks that every query sees whole and
the two or three blocks behind them. Those are masked by comparing, and clamped: rows past the highest position are
never read, loads keep their 128 bits, and lengths are no part of what is compiled. The tile with the most keys runs
first; the tile that is not full is the one with the fewest keys (filled from the front it was 1.172, not 1.098).

    registers, spills, ntm, ntm with mask      sm_80                  sm_90
    head_dim 64, batch                         241, 0,  856, 1129     172, 0,  879, 1165
    head_dim 128, batch                        206, 0,  650,  803     214, 0,  482,  642
    head_dim 128, packed                       254, 0,  649,  803     230, 0,  483,  632
    head_dim 128, pages of 16 (of 128)         255, 0,  744 (725)     255, 10 (none in the loops), 576 (519)
    head_dim 128, soft-capping                 207, 0, 1137           216, 0,  963
    head_dim 128, e4m3 (e5m2) in pages of 16   248, 0, 6319 (3222)    255, 0, 1248 (790)

Pages take a pointer for each row, where batch and packed keys on sm_90 have one descriptor for the block. A page that
holds whole blocks is one base pointer and runs like a batch. Soft-capping is a hyperbolic tangent, through an
exponential and a division: `tanh.approx` would be half of it, with errors of softcap * 2^-11 in a score; this has
softcap * 2^-23. fp8 numbers become float16 by shifting bits: on sm_80 each warp converts the whole block, and it is the
reads of a long decode that fp8 halves. Keys' scales go into the softmax's scale, values' into the output.

Few queries. Where less than a third of the GPU would be busy, the keys of a tile are split over programs, as many as
make one wave (`configs.splits`, from shapes alone), and tiles of 16 or 64 rows take 4 warps: the bound is then the
reading of K and V. Results do not depend on the order of programs, but the number of splits, and so the rounding, does
depend on the batch's size.

Tried, and lost:
- 64-bit offsets in the key loop: 40 registers, and on sm_80 28 spills. The base is 64-bit, offsets inside are 32-bit.
- Rows and heads of the tile kept for the store: 40 registers. They are computed again, from an index that the compiler
  cannot know to be the same.
- On sm_90, the mask that compares columns: ntm 614, but 254 registers. K of masked blocks by descriptor: ntm 657.
- Where keys are split, the compiler's analysis loses the alignment of K and V and loads them by 16 bits; it is told
  (`VECTOR`). Other ways to write the loop's bounds did not help.
- Half as many keys in masked blocks: fewer pairs (1.08), but the accumulator is scaled twice as often there.
- float32 products are exact (`input_precision="ieee"`; TF32 has errors of 1e-3), without tensor cores: small tiles.
"""

import math

import torch
import triton

from orthorank_kernels.triton import configs
from orthorank_kernels.triton.attention_combine import combine, workspace
from orthorank_kernels.triton.attention_kernel import sparse_query_attention_kernel

INT32_MAX = 2**31 - 1
LARGEST_HEAD_DIM = 256
FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
Outputs = tuple[torch.Tensor, torch.Tensor | None]


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
    *,
    out: Outputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention`. Arguments are taken as checked."""
    batch, heads, selected, head_dim = q.shape
    if out is None:
        made = torch.empty(batch, selected, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
        lse = torch.empty(batch, heads, selected, dtype=torch.float32, device=q.device) if return_lse else None
        out = (made, lse)
    _launch(
        q, k, v, positions, out, rows=selected, longest=k.shape[2], scale=scale, window=window, softcap=softcap,
        sinks=sinks, starts=starts, query_offset=query_offset,
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
    *,
    out: Outputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention_varlen`. Arguments are taken as checked."""
    out = out or _packed_outputs(q, return_lse)
    longest = k.shape[0] if max_seqlen_k is None else min(k.shape[0], max_seqlen_k)
    _launch(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), positions.unsqueeze(0), _batch_of_one(out),
        cu_selected=cu_selected, cu_keys=cu_seqlens_k, rows=_rows_of_a_sequence(q, cu_selected), longest=longest,
        scale=scale, window=window, softcap=softcap, sinks=sinks,
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
    *,
    out: Outputs | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention_paged`. Arguments are taken as checked."""
    out = out or _packed_outputs(q, return_lse)
    capacity = block_table.shape[1] * k_cache.shape[1]
    _launch(
        q.transpose(0, 1).unsqueeze(0), k_cache.transpose(1, 2), v_cache.transpose(1, 2), positions.unsqueeze(0),
        _batch_of_one(out), cu_selected=cu_selected, seq_lens=seq_lens, block_table=block_table, table_rows=table_rows,
        k_scale=k_scale, v_scale=v_scale, rows=_rows_of_a_sequence(q, cu_selected), scale=scale, window=window,
        longest=capacity if max_seqlen_k is None else min(capacity, max_seqlen_k), softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return _returned(out)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    outputs: Outputs,
    *,
    rows: int,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None = None,
    query_offset: int = 0,
    cu_selected: torch.Tensor | None = None,
    cu_keys: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """One launch for every layout, or two where keys are split.

    Args:
        q: ``[batch, heads, selected, head_dim]``; packed queries are a batch of one.
        k, v: ``[batch, kv_heads, keys, head_dim]``; packed keys are a batch of one, pages a batch of pages.
        outputs: like q, and ``[batch, heads, selected]``.
        rows: queries of a sequence, on average; longest: keys of a sequence, at most. Both only choose settings.
    """
    batch, heads, selected, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    _check_supported(head_dim, q.dtype)
    if outputs[0].numel() == 0:
        return
    target = configs.target_of(q.device)
    constexprs, num_warps, num_stages = configs.launch_settings(head_dim, heads // kv_heads, q.dtype, target, rows)
    fp8 = FP8.get(k.dtype, "")
    if fp8:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    paged = block_table is not None
    tma = constexprs.pop("TMA") and not paged and configs.fits_tma(k) and configs.fits_tma(v)
    block = [1, 1, constexprs["BLOCK_N"], constexprs["BLOCK_D"]]
    n_seqs = 0 if cu_selected is None else cu_selected.shape[0] - 1
    tiles = configs.tiles(selected, constexprs["BLOCK_M"] // constexprs["PACK"], n_seqs, packed=cu_selected is not None)
    columns = kv_heads * triton.cdiv(constexprs["GROUP"], constexprs["PACK"])
    splits = configs.splits(tiles * columns * batch, longest, constexprs["BLOCK_M"], constexprs["BLOCK_N"], q.device)
    strides = _output_strides(*outputs)
    out, lse, totals = (*outputs, None)
    parts = workspace(splits, batch, selected, heads, head_dim, q.device) if splits > 1 else None
    if parts is not None:
        out, lse, totals = parts
        strides = _output_strides(out.transpose(2, 3), lse.transpose(2, 3), split=True)
    with torch.cuda.device_of(q):
        sparse_query_attention_kernel[(tiles * splits, columns, batch)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            k_desc=_descriptor(k, block) if tma else None,
            v_desc=_descriptor(v, block) if tma else None,
            positions_ptr=positions,
            starts_ptr=starts,
            cu_selected_ptr=cu_selected,
            cu_keys_ptr=cu_keys,
            seq_lens_ptr=seq_lens,
            table_ptr=block_table,
            table_rows_ptr=table_rows,
            sinks_ptr=sinks,
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            out_ptr=out,
            lse_ptr=lse,
            totals_ptr=totals,
            selected=selected,
            keys=keys,
            n_seqs=n_seqs,
            splits=splits,
            window=None if window is None else min(window, INT32_MAX),
            query_offset=query_offset,
            to_bits=scale * math.log2(math.e) * (1 if softcap is None else 2 / softcap),
            cap=0.0 if softcap is None else softcap * math.log2(math.e),
            stride_q_batch=q.stride(0),
            stride_q_head=q.stride(1),
            stride_q_token=q.stride(2),
            stride_k_batch=k.stride(0),
            stride_k_head=k.stride(1),
            stride_v_batch=v.stride(0),
            stride_v_head=v.stride(1),
            stride_positions_batch=positions.stride(0),
            stride_table_row=block_table.stride(0) if paged else 0,
            stride_k_scale=_scale_stride(k_scale),
            stride_v_scale=_scale_stride(v_scale),
            **strides,
            STRIDE_K=_token_stride(k),
            STRIDE_V=_token_stride(v),
            STRIDE_POSITIONS=positions.stride(1) if selected > 1 else 1,
            PACKED=cu_selected is not None,
            PAGE_SIZE=keys if paged else 0,
            LIKE_K=paged and k.stride(0) == v.stride(0),
            HAS_STARTS=starts is not None,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            HAS_LSE=lse is not None,
            HAS_TABLE_ROWS=table_rows is not None,
            HAS_K_SCALE=k_scale is not None,
            HAS_V_SCALE=v_scale is not None,
            SOFTCAP=softcap is not None,
            FP8=fp8,
            SPLIT=parts is not None,
            TMA=tma,
            WIDE=keys * max(_token_stride(k), _token_stride(v)) > INT32_MAX,
            VECTOR=16 // k.element_size() if parts is not None and _is_aligned(k) and _is_aligned(v) else 1,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
            **constexprs,
        )
        if parts is not None:
            combine(parts, *outputs)


def _packed_outputs(q: torch.Tensor, return_lse: bool) -> Outputs:
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _batch_of_one(out: Outputs) -> Outputs:
    """Packed outputs, ``[selected, heads, head_dim]`` and ``[selected, heads]``, as those of a batch."""
    return out[0].transpose(0, 1).unsqueeze(0), None if out[1] is None else out[1].transpose(0, 1).unsqueeze(0)


def _returned(out: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator has no optional results: an empty one where there is no log-sum-exp."""
    return out[0], out[0].new_empty(0, dtype=torch.float32) if out[1] is None else out[1]


def _rows_of_a_sequence(q: torch.Tensor, cu_selected: torch.Tensor) -> int:
    return triton.cdiv(q.shape[0], max(1, cu_selected.shape[0] - 1))


def _output_strides(out: torch.Tensor, lse: torch.Tensor | None, *, split: bool = False) -> dict[str, int]:
    """Of ``[batch, heads, selected, head_dim]`` and ``[batch, heads, selected]``, or those of ``[splits, ...]``."""
    strides = {"stride_out_split": 0, "stride_lse_split": 0}
    for i, name in enumerate(("split", "batch", "head", "token") if split else ("batch", "head", "token")):
        strides[f"stride_out_{name}"] = out.stride(i)
        strides[f"stride_lse_{name}"] = 0 if lse is None else lse.stride(i)
    return strides


def _check_supported(head_dim: int, dtype: torch.dtype) -> None:
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"q has head_dim {head_dim}; the Triton kernel takes at most {LARGEST_HEAD_DIM}: "
            'pass backend="reference" for larger ones'
        )
    if dtype == torch.float64:
        raise TypeError(
            "q has dtype float64; the Triton kernel takes float32, float16 and bfloat16: "
            'convert q, k and v, or pass backend="reference"'
        )


def _scale_stride(scale: torch.Tensor | None) -> int:
    """One scale for all heads has stride 0."""
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes. Told to the compiler where it does not find out by itself:
    where keys are split, its analysis gives up at the loops' bounds, and it would load one number at a time."""
    return all(n * x.element_size() % 16 == 0 for n in x.stride()[:-1]) and x.data_ptr() % 16 == 0


def _token_stride(x: torch.Tensor) -> int:
    """Stride between tokens. With one token any number can stand there; one choice saves compiling for each."""
    return x.stride(2) if x.shape[2] > 1 else x.shape[3]


def _descriptor(x: torch.Tensor, block: list[int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor  # missing before Triton 3.4

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
