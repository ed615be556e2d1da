"""What threads of the attention kernel for sm_90 put into shared memory, where products read it. Device functions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from orthorank_kernels.triton.hopper.gluon import page_of
from orthorank_kernels.triton.hopper.step import WARPS

COLUMNS = gl.constexpr(64)  # that threads load at a time: with all of head_dim 256 at hand, turned queries spill
# Sixteen bytes a thread, for what goes to and from global memory.
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS.value, 1], [1, 0]))
PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [WARPS.value, 1], [1, 0]))  # of numbers that WIDE has in a row
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))  # the same of one warp


@gluon.jit
def fill_queries(
    q_buf,  # [ROWS, BLOCK_D]
    q_ptr,
    rows,  # [ROWS], in numbers from q_ptr
    in_tile,
    tables,
    position,
    sees,  # of the others the tables may have no row, and nobody uses the result
    BLOCK_D: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    ROTARY_DIM: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):
    """The rows of a part, turned by the angles of their positions, and zeros elsewhere."""
    for i in gl.static_range(BLOCK_D // COLUMNS):
        columns = q_buf.slice(i * COLUMNS, COLUMNS, 1)
        _fill_columns(
            columns, q_ptr, rows, in_tile, tables, position, sees, i * COLUMNS, HEAD_DIM, ROTARY_DIM, INTERLEAVED
        )
    fence_async_shared()


@gluon.jit
def _fill_columns(
    q_buf,  # [ROWS, COLUMNS]
    q_ptr,
    rows,
    in_tile,
    tables,
    position,
    sees,
    FIRST: gl.constexpr,  # of the columns
    HEAD_DIM: gl.constexpr,
    ROTARY_DIM: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):
    """COLUMNS columns of the rows: see `fill_queries`."""
    offs_d = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, WIDE))
    mask = in_tile[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = gl.load(q_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if ROTARY_DIM > FIRST:  # fused as in `primitives.turn`, so that the result is that of `apply_rotary_at` to the bit
        if INTERLEAVED:
            turned = _turned_pairs(q, tables, position, sees, FIRST, ROTARY_DIM)
        else:
            turned = _turned_halves(q, q_ptr, rows, tables, position, sees, offs_d, ROTARY_DIM)
        q = turned if ROTARY_DIM >= FIRST + COLUMNS else gl.where((offs_d < ROTARY_DIM)[None, :], turned, q)
    q_buf.store(q)


@gluon.jit
def _turned_halves(q, q_ptr, rows, tables, position, sees, offs_d, ROTARY_DIM: gl.constexpr):
    """Each element's other one is read, too: see `attention_queries.turn_queries`."""
    cos_ptr, sin_ptr, stride_cos_token, stride_sin_token = tables
    HALF: gl.constexpr = ROTARY_DIM // 2
    TOGETHER: gl.constexpr = 8 if HALF % 8 == 0 else HALF & -HALF
    first = offs_d < HALF
    partner = gl.where(first, offs_d + HALF, offs_d - HALF)
    partner = gl.max_contiguous(gl.multiple_of(partner, TOGETHER), TOGETHER)[None, :]
    angle = gl.where(first, offs_d, offs_d - HALF)
    angle = gl.max_contiguous(gl.multiple_of(angle, TOGETHER), TOGETHER)[None, :]
    some = sees[:, None] & (offs_d < ROTARY_DIM)[None, :]
    at = position.to(gl.int64)[:, None]
    # One product before the other is read: with all four at hand, head_dim 128 spills.
    sin = gl.load(sin_ptr + at * stride_sin_token + angle, mask=some, other=0.0).to(gl.float32)
    other = gl.load(q_ptr + rows[:, None] + partner, mask=some, other=0.0).to(gl.float32)
    other = -(other * gl.where(first[None, :], sin, -sin))
    cos = gl.load(cos_ptr + at * stride_cos_token + angle, mask=some, other=0.0).to(gl.float32)
    return gl.fma(q.to(gl.float32), cos, other).to(q.dtype)


@gluon.jit
def _turned_pairs(q, tables, position, sees, FIRST: gl.constexpr, ROTARY_DIM: gl.constexpr):
    """Interleaved: a thread has both elements of a pair."""
    cos_ptr, sin_ptr, stride_cos_token, stride_sin_token = tables
    x1, x2 = gl.split(q.to(gl.float32).reshape([q.shape[0], COLUMNS // 2, 2]))
    x1, x2 = gl.convert_layout(x1, PAIRS), gl.convert_layout(x2, PAIRS)
    angle = FIRST // 2 + gl.arange(0, COLUMNS // 2, layout=gl.SliceLayout(0, PAIRS))[None, :]
    some = gl.convert_layout(sees, gl.SliceLayout(1, PAIRS))[:, None] & (angle < ROTARY_DIM // 2)
    at = gl.convert_layout(position, gl.SliceLayout(1, PAIRS)).to(gl.int64)[:, None]
    cos = gl.load(cos_ptr + at * stride_cos_token + angle, mask=some, other=0.0).to(gl.float32)
    sin = gl.load(sin_ptr + at * stride_sin_token + angle, mask=some, other=0.0).to(gl.float32)
    turned = gl.join(gl.fma(x1, cos, -(x2 * sin)), gl.fma(x2, cos, x1 * sin)).reshape([q.shape[0], COLUMNS])
    return gl.convert_layout(turned.to(q.dtype), WIDE)


@gluon.jit
def fill_last_values(
    v_buf,  # [1, 1, BLOCK_N, BLOCK_D]
    values,
    n,
    lowest,
    high,
    PAGE_SIZE: gl.constexpr,
    STRIDE_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """The values of the keys from n on, and zeros before ``lowest``, behind ``high`` and from HEAD_DIM on."""
    row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, WIDE))
    there = n + row <= high
    if PAGE_SIZE > 0:  # else ``lowest`` begins a block
        there = there & (n + row >= lowest)
    ptrs = _rows_of_values(values, n, row, there, PAGE_SIZE, STRIDE_V)
    _fill_values(v_buf.reshape([BLOCK_N, BLOCK_D]), ptrs, there, WIDE, BLOCK_D, HEAD_DIM)


@gluon.jit
def fill_first_values(
    v_buf,  # [1, 1, BLOCK_N, BLOCK_D]
    values,
    n,
    lowest,
    page,
    PAGE_SIZE: gl.constexpr,
    STRIDE_V: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """The same of the first ROWS keys alone, which one page has, by the threads of one warp."""
    v_ptr, _table_ptr, _n_pages, stride_v_page = values
    v_ptr += page.to(gl.int64) * stride_v_page + (n & (PAGE_SIZE - 1)).to(gl.int64) * STRIDE_V
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, NARROW))
    v_buf = v_buf.reshape([BLOCK_N, BLOCK_D]).slice(0, ROWS, 0)
    _fill_values(v_buf, v_ptr + row * STRIDE_V, n + row >= lowest, NARROW, BLOCK_D, HEAD_DIM)


@gluon.jit
def _rows_of_values(values, n, row, there, PAGE_SIZE: gl.constexpr, STRIDE_V: gl.constexpr):
    """Pointers to the rows of V of the keys n + row: like ``row``."""
    v_ptr, _table_ptr, _n_pages, stride_v_page = values
    if PAGE_SIZE > 0:
        page = page_of(values, n + row, there, PAGE_SIZE)
        return v_ptr + page.to(gl.int64) * stride_v_page + ((n + row) & (PAGE_SIZE - 1)).to(gl.int64) * STRIDE_V
    return v_ptr + n.to(gl.int64) * STRIDE_V + row * STRIDE_V


@gluon.jit
def _fill_values(v_buf, ptrs, there, LAYOUT: gl.constexpr, BLOCK_D: gl.constexpr, HEAD_DIM: gl.constexpr):
    for i in gl.static_range(BLOCK_D // COLUMNS):
        offs_d = i * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        mask = there[:, None] & (offs_d < HEAD_DIM)[None, :]
        v = gl.load(ptrs[:, None] + offs_d[None, :], mask=mask, other=0.0)
        v_buf.slice(i * COLUMNS, COLUMNS, 1).store(v)
        if LAYOUT == NARROW:  # no load passes a fence: with more than one at hand, the copying warp spills
            fence_async_shared()
    fence_async_shared()
