"""What the warp does that copies keys and values for the attention kernel for sm_90. Device functions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from orthorank_kernels.triton.hopper.fill import fill_first_values
from orthorank_kernels.triton.hopper.gluon import async_load, page_of


@gluon.jit
def produce(
    k_desc,
    v_desc,
    rings,
    values,
    place,
    where,
    PAGE_SIZE: gl.constexpr,
    EDGE: gl.constexpr,
    STRIDE_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy blocks of keys and values as their places in the rings become free."""
    blocks = where[3]
    for i in range(blocks - 1 if EDGE else blocks):
        copy_block(
            i, k_desc, v_desc, rings, values, place, where, PAGE_SIZE, False, STRIDE_V, BLOCK_N, BLOCK_D, HEAD_DIM,
            STAGES,
        )  # fmt: skip
    if EDGE:
        copy_block(
            blocks - 1, k_desc, v_desc, rings, values, place, where, PAGE_SIZE, True, STRIDE_V, BLOCK_N, BLOCK_D,
            HEAD_DIM, STAGES,
        )  # fmt: skip


@gluon.jit
def copy_block(
    i,
    k_desc,
    v_desc,
    rings,
    values,
    place,
    where,
    PAGE_SIZE: gl.constexpr,
    EDGE: gl.constexpr,
    STRIDE_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Block i, without the values of the last keys (block 0), which are the first consumer's (`fill.fill_last_values`).

    With EDGE the block has the first keys, of whose values threads of this warp load a few: `fill.fill_first_values`.
    """
    k_bufs, v_bufs, k_full, k_empty, v_full, v_empty = rings
    batch, kv_head, key_base = place
    low, lowest, high, blocks = where
    ROWS: gl.constexpr = k_desc.block_type.shape[2]  # of a copy
    COPIES: gl.constexpr = BLOCK_N // ROWS
    at = i % STAGES
    free = (i // STAGES & 1) ^ 1
    n = low + (blocks - 1 - i) * BLOCK_N
    pages = ()
    if PAGE_SIZE > 0:  # before the waits, so that nothing waits for the table
        for part in gl.static_range(COPIES):
            page = page_of(values, gl.minimum(n + part * ROWS, high), high >= 0, PAGE_SIZE)
            pages = pages + (page,)  # noqa: RUF005 - Triton unpacks nothing
    mbarrier.wait(k_empty.index(at), free)
    mbarrier.expect(k_full.index(at), COPIES * k_desc.block_type.nbytes)
    copy(k_desc, k_full.index(at), k_bufs.index(at), batch, kv_head, key_base + n, pages, 0, COPIES, PAGE_SIZE, ROWS)
    if i > 0:
        mbarrier.wait(v_empty.index(at), free)
        if EDGE:
            fill_first_values(
                v_bufs.index(at), values, n, lowest, pages[0], PAGE_SIZE, STRIDE_V, ROWS, BLOCK_N, BLOCK_D, HEAD_DIM
            )
        mbarrier.expect(v_full.index(at), (COPIES - EDGE) * v_desc.block_type.nbytes)
        copy(
            v_desc, v_full.index(at), v_bufs.index(at), batch, kv_head, key_base + n, pages, EDGE, COPIES, PAGE_SIZE,
            ROWS,
        )  # fmt: skip


@gluon.jit
def copy(
    desc,
    full,
    buf,  # [1, 1, BLOCK_N, BLOCK_D]
    batch,
    kv_head,
    n,
    pages,  # of each copy of a block; () where keys are not in pages
    FIRST: gl.constexpr,  # copy
    END: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    ROWS: gl.constexpr,  # of a copy
):
    """Keys or values from n on, by TMA: a block at once, or so many rows of a page each."""
    for part in gl.static_range(FIRST, END):
        if PAGE_SIZE > 0:
            place = [pages[part], kv_head, (n + part * ROWS) & (PAGE_SIZE - 1), 0]
        else:
            place = [batch, kv_head, n, 0]
        async_load(desc, place, full, buf.slice(part * ROWS, ROWS, 2))
