"""Launches the attention kernel, for every layout; `triton/attention.py` says why so."""

import math

import torch

from orthorank_kernels.triton import configs
from orthorank_kernels.triton.attention_combine import combine, workspace
from orthorank_kernels.triton.attention_kernel import sparse_query_attention_kernel
from orthorank_kernels.triton.hopper import launch as hopper
from orthorank_kernels.triton.strides import strides, table_strides

INT32_MAX = 2**31 - 1
LARGEST_HEAD_DIM = 256
FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
Rotary = tuple[torch.Tensor | None, torch.Tensor | None, bool, int | None]  # cos, sin, interleaved, rotary_dim
Outputs = tuple[torch.Tensor, torch.Tensor | None]


def launch(
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
    rotary: Rotary = (None, None, False, None),
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
        rotary: tables ``[batch or 1, tokens, width]`` to rotate q by, or none.
        rows: queries of a sequence, on average; longest: keys of a sequence, at most. Both only choose settings.
    """
    batch, heads, selected, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    cos, sin, interleaved, rotary_dim = rotary
    _check_supported(head_dim, q.dtype)
    if outputs[0].numel() == 0:
        return
    target = configs.target_of(q.device)
    asked = hopper.is_asked_for()
    if asked:
        hopper.check(q, k, v, paged=block_table is not None, target=target)
    constexprs, num_warps, num_stages = configs.launch_settings(head_dim, heads // kv_heads, q.dtype, target, rows)
    fp8 = FP8.get(k.dtype, "")
    if fp8:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    paged = block_table is not None
    tma = constexprs.pop("TMA") and not paged and configs.fits_tma(k) and configs.fits_tma(v)
    block = [1, 1, constexprs["BLOCK_N"], constexprs["BLOCK_D"]]
    n_seqs = 0 if cu_selected is None else cu_selected.shape[0] - 1
    tiles = configs.tiles(selected, constexprs["BLOCK_M"] // constexprs["PACK"], n_seqs, packed=cu_selected is not None)
    columns = kv_heads * configs.cdiv(constexprs["GROUP"], constexprs["PACK"])
    every_key = keys if not paged else min(n_seqs * longest, keys * k.shape[0])
    head_bytes = 2 * every_key * head_dim * k.element_size()
    lanes_together, seqs_together = configs.together(columns // kv_heads, columns * batch, n_seqs, head_bytes)
    splits = configs.splits(tiles * columns * batch, longest, constexprs["BLOCK_M"], constexprs["BLOCK_N"], q.device)
    programs = tiles * splits * columns * batch
    if programs > INT32_MAX:  # so that 32 bits number them, and all that `find_work` divides them into
        raise ValueError(
            f"{tiles:,} tiles of queries, {splits} splits, {columns} columns of heads and {batch} batch rows are "
            f"{programs:,} programs; a launch has at most {INT32_MAX:,}: call the op for parts of the batch"
        )
    out, lse, totals = (*outputs, None)
    to = {"stride_out_split": 0, "stride_lse_split": 0, **strides("batch", "head", "token", out=out, lse=lse)}
    parts = workspace(splits, batch, selected, heads, head_dim, q) if splits > 1 else None
    if parts is not None:
        out, lse, totals = parts
        to = strides("split", "batch", "head", "token", out=out.transpose(2, 3), lse=lse.transpose(2, 3))
    if asked and hopper.takes(q, k, v, paged=paged, rows_of_a_tile=constexprs["BLOCK_M"]):
        hopper.launch(
            q, k, v, positions, out, lse, totals, to, splits=splits, pack=constexprs["PACK"],
            lanes_together=lanes_together, scale=scale, window=None if window is None else min(window, INT32_MAX),
            softcap=softcap, sinks=sinks, starts=starts, query_offset=query_offset, cos=cos, sin=sin,
            rotary_dim=rotary_dim or 0, rotary_interleaved=interleaved, cu_selected=cu_selected, cu_keys=cu_keys,
            seq_lens=seq_lens, block_table=block_table, table_rows=table_rows,
        )  # fmt: skip
        if parts is not None:
            combine(parts, *outputs)
        return
    configs.launch(
        sparse_query_attention_kernel,
        (programs,),
        q,
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
        cos_ptr=cos,
        sin_ptr=sin,
        sinks_ptr=sinks,
        k_scale_ptr=k_scale,
        v_scale_ptr=v_scale,
        out_ptr=out,
        lse_ptr=lse,
        totals_ptr=totals,
        selected=selected,
        keys=keys,
        n_pages=min(k.shape[0], INT32_MAX),
        n_table_rows=block_table.shape[0] if paged else 0,
        most_keys=min(block_table.shape[1] * keys, INT32_MAX) if paged and k.shape[0] else 0,
        n_seqs=n_seqs,
        tiles=tiles,
        columns=columns,
        lanes=columns * batch,
        lanes_together=lanes_together,
        seqs_together=seqs_together,
        splits=splits,
        window=None if window is None else min(window, INT32_MAX),
        query_offset=query_offset,
        to_bits=scale * math.log2(math.e) * (1 if softcap is None else 2 / softcap),
        cap=0.0 if softcap is None else softcap * math.log2(math.e),
        **strides("batch", "head", "token", q=q),
        **strides("batch", "head", k=k, v=v),
        **strides("batch", positions=positions),
        **table_strides(cos=cos, sin=sin),
        **strides("row", table=block_table),
        stride_k_scale=_scale_stride(k_scale),
        stride_v_scale=_scale_stride(v_scale),
        **to,
        STRIDE_K=_token_stride(k),
        STRIDE_V=_token_stride(v),
        PACKED=cu_selected is not None,
        PAGE_SIZE=keys if paged else 0,
        LIKE_K=paged and k.stride(0) == v.stride(0),
        SOFTCAP=softcap is not None,
        ROTARY_DIM=0 if cos is None else rotary_dim,
        INTERLEAVED=interleaved,
        FP8=fp8,
        SPLIT=parts is not None,
        TMA=tma,
        VENDOR=configs.vendor(target),
        WIDE=keys * max(_token_stride(k), _token_stride(v)) > INT32_MAX,
        VECTOR=16 // k.element_size() if _is_aligned(k) and _is_aligned(v) else 1,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
        **constexprs,
    )
    if parts is not None:
        combine(parts, *outputs)


def _check_supported(head_dim: int, dtype: torch.dtype) -> None:
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"q has head_dim {head_dim}; the Triton kernel takes at most {LARGEST_HEAD_DIM}: "
            'pass backend="torch" for larger ones'
        )
    if dtype == torch.float64:
        raise TypeError(
            "q has dtype float64; the Triton kernel takes float32, float16 and bfloat16: "
            'convert q, k and v, or pass backend="torch"'
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
