"""When the attention kernel for sm_90 runs, and its launch."""

import math
import os
from importlib.metadata import version
from importlib.util import find_spec

import torch

from orthorank_kernels.triton import configs
from orthorank_kernels.triton.strides import strides, table_strides

VARIABLE = "ORTHORANK_ATTENTION"
NAME = "hopper"
BLOCKS = {64: 128, 96: 128, 128: 128, 192: 64, 256: 64}  # keys of a block, by head_dim
STAGES = 2
ROWS_OF_A_PAGE = 16  # at least; with a window, which may begin anywhere, a copy has no more
INT32_MAX = 2**31 - 1
PART = 64  # rows of a tile that one group of four warps has; a tile has two parts
# Threads begin with ENTRY registers each, and give up or take over what the copying warp does not need. Twelve warps,
# of which three idle beside the one that copies: 168 * 384 is what an SM has, less than 1,024.
ENTRY = 168


def is_asked_for() -> bool:
    """Whether ``ORTHORANK_ATTENTION=hopper`` asks for this kernel.

    Raises:
        ValueError: it has another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", NAME):
        raise ValueError(f"{VARIABLE} is {value!r}; it must be {NAME!r}, or not be set: then the usual kernel runs")
    return value == NAME


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    paged: bool,
    target: str,
) -> None:
    """Raise unless the kernel takes a call with these arguments on this target.

    Raises:
        ValueError: names what it does not take, and says what to do.
    """
    head_dim, found = q.shape[3], configs.family(target)
    *others, largest = BLOCKS
    if found != "hopper":
        reason = f"is for GPUs of compute capability 9.0, and this is {target}"
    elif not _has_gluon():
        reason = "needs Triton 3.6 or newer with triton.experimental.gluon"
    elif q.dtype not in (torch.float16, torch.bfloat16):
        reason = f"takes float16 and bfloat16, and q has {str(q.dtype).removeprefix('torch.')}"
    elif head_dim not in BLOCKS:
        reason = f"takes head_dim {', '.join(map(str, others))} and {largest}, and q has {head_dim}"
    elif not (paged or (configs.fits_tma(k) and configs.fits_tma(v))):
        reason = (
            "reads k and v by tensor descriptors: their memory and all strides must be multiples of 16 bytes, no "
            "dimension may be empty or expanded, and ORTHORANK_TMA must not be 0"
        )
    else:
        return
    raise ValueError(f"{VARIABLE}={NAME} asks for a kernel that {reason}; leave {VARIABLE} out to run the usual one")


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, paged: bool, rows_of_a_tile: int) -> bool:
    """Whether the kernel takes a call that `check` has let pass, else the usual one does.

    Stays there: tiles of few rows, and caches of float8, with pages of other sizes than powers of
    two from 16 on, or that no tensor descriptor describes.
    """
    if rows_of_a_tile <= configs.FEW_ROWS[-1]:
        return False
    if not paged:
        return True
    page = k.shape[2]
    fits = configs.fits_tma(k) and configs.fits_tma(v)
    return k.dtype == v.dtype == q.dtype and page >= ROWS_OF_A_PAGE and page & (page - 1) == 0 and fits


def consumer_registers(head_dim: int, *, paged: bool, window: bool) -> int:
    """Registers of a thread that attends; one that copies has what those leave of 3 * ENTRY.

    The copying warp needs more for the numbers of pages, and more again where threads of it load the first values of a
    window. What it has too few of spills, and so does what all warps read once and keep.
    """
    wide = configs.next_power_of_2(head_dim)
    if paged and window:
        return {64: 216, 128: 224, 256: 232}[wide]
    return 232 if paged or (window and wide == 64) else 240


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    totals: torch.Tensor | None,
    to: dict[str, int],
    *,
    splits: int,
    pack: int,
    lanes_together: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    query_offset: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rotary_dim: int,
    rotary_interleaved: bool,
    cu_selected: torch.Tensor | None,
    cu_keys: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    block_table: torch.Tensor | None,
    table_rows: torch.Tensor | None,
) -> None:
    """Launch the kernel on what `check` has let pass; arguments as in `triton.attention_launch.launch`.

    Args:
        out, lse, totals: the results, or with ``splits`` above 1 what these leave (`attention_combine.Workspace`).
        to: their strides, as the kernel names them.
        pack: heads of a group that share a tile. lanes_together: see `attention_tiles.find_work`.
        cos, sin: ``[batch or 1, tokens, width]``, to turn the first ``rotary_dim`` elements of q by, or none and 0.
    """
    from orthorank_kernels.triton.hopper.kernel import hopper_attention_kernel

    batch, heads, selected, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    columns = kv_heads * configs.cdiv(group, pack)
    paged = block_table is not None
    rows = BLOCKS[head_dim]  # of a copy
    if paged:
        rows = min(int(keys), rows) if window is None else ROWS_OF_A_PAGE  # an int in every launch plan
    consumer = consumer_registers(head_dim, paged=paged, window=window is not None)
    packed, n_seqs = cu_selected is not None, 0 if cu_selected is None else cu_selected.shape[0] - 1
    tiles, lanes = configs.tiles(selected, 2 * (PART // pack), n_seqs, packed=packed), columns * batch
    configs.launch(
        hopper_attention_kernel,
        (tiles * splits * lanes,),
        q,
        q_ptr=q,
        k_desc=_descriptor(k, rows),
        v_desc=_descriptor(v, rows),
        v_ptr=v,
        positions_ptr=positions,
        starts_ptr=starts,
        cu_selected_ptr=cu_selected,
        cu_keys_ptr=cu_keys,
        seq_lens_ptr=seq_lens,
        table_ptr=block_table,
        table_rows_ptr=table_rows,
        sinks_ptr=sinks,
        out_ptr=out,
        lse_ptr=lse,
        totals_ptr=totals,
        cos_ptr=cos,
        sin_ptr=sin,
        selected=selected,
        keys=keys,
        n_pages=min(k.shape[0], INT32_MAX),
        n_table_rows=block_table.shape[0] if paged else 0,
        most_keys=min(block_table.shape[1] * keys, INT32_MAX) if paged else 0,
        n_seqs=n_seqs,
        query_offset=query_offset,
        window=window,
        tiles=tiles,
        columns=columns,
        lanes=lanes,
        lanes_together=lanes_together,
        splits=splits,
        to_bits=scale * math.log2(math.e) * (1 if softcap is None else 2 / softcap),
        cap=0.0 if softcap is None else softcap * math.log2(math.e),
        **strides("batch", "head", "token", q=q),
        **to,
        **strides("batch", "head", v=v),
        **strides("batch", positions=positions),
        **strides("row", table=block_table),
        **table_strides(cos=cos, sin=sin),
        STRIDE_V=v.stride(2),
        GROUP=group,
        PACK=pack,
        BLOCK_N=BLOCKS[head_dim],
        BLOCK_D=configs.next_power_of_2(head_dim),
        HEAD_DIM=head_dim,
        STAGES=STAGES,
        PACKED=packed,
        PAGE_SIZE=keys if paged else 0,
        SOFTCAP=softcap is not None,
        SPLIT=totals is not None,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=rotary_interleaved,
        CONSUMER_REGISTERS=consumer,
        PRODUCER_REGISTERS=3 * ENTRY - 2 * consumer,
        num_warps=4,
        maxnreg=ENTRY,
        enable_fp_fusion=True,
    )


def _has_gluon() -> bool:
    found = tuple(map(int, version("triton").split(".")[:2]))
    return found >= (3, 6) and find_spec("triton.experimental.gluon") is not None


def _descriptor(x: torch.Tensor, rows: int) -> object:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, configs.next_power_of_2(x.shape[3])]
    kind = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
