"""What a group of four warps of the attention kernel for sm_90 does with a block of keys. Device functions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from orthorank_kernels.triton.hopper.gluon import tile_rows

CONSUMERS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a consumer
ROWS = gl.constexpr(64)  # of a consumer: what one of its products has
MASKED_SCORE = gl.constexpr(-(2.0**100))


@gluon.jit
def rows_of_part(part, row, tile, begin, end, column, GROUP: gl.constexpr, PACK: gl.constexpr):
    """Query and head of each row of a part of a tile, and whether there is one: like ``row`` each."""
    return tile_rows(row, tile * CONSUMERS + part, begin, end, column, GROUP, PACK, ROWS)


@gluon.jit
def visible_keys(positions_ptr, query, in_tile, query_offset, keys, start, window):
    """Position of a row, whether it sees any key, and the first and the last one that it sees: like ``query`` each."""
    position = gl.load(positions_ptr + query, mask=in_tile, other=-1)
    at = position + query_offset
    last = gl.minimum(at, keys - 1)
    first = position * 0 + start
    if window is not None:
        first = gl.maximum(first, at - window + 1)
    return position, (position >= 0) & (first <= last), first, last


@gluon.jit
def done_before(x):
    """What ``x`` is computed from is done before what follows.

    The assembler would put the wait for the sums of values before the exponentials that are to run meanwhile: it knows
    of nothing between the two. It moves nothing across a barrier of a warp, of which the lanes depend on ``x``. (All of
    them: ``x`` is a sum of exponentials, whose sign bit is 0; that of the NaN which arithmetic gives is 0, too.)
    """
    gl.inline_asm_elementwise(
        "{.reg .b32 lanes; shr.s32 lanes, $1, 31; not.b32 lanes, lanes; bar.warp.sync lanes; mov.b32 $0, lanes;}",
        "=r,r",
        [x.to(gl.int32, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def reciprocal(x):
    """1 / x to the last bit but one, in one instruction."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softmax_step(
    qk,
    peak,
    total,
    first,
    last,
    n,
    numbers,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
    MASKED: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):
    """One step of the online softmax over the keys from n on. Weights [ROWS, BLOCK_N], and of each row the largest
    score in bits, what earlier sums shrink by, and the sum of weights.

    ``numbers``: what q k is multiplied by, and the cap: as `attention_kernel` has them.
    """
    to_bits, cap = numbers
    if SOFTCAP:  # cap * tanh(x) = cap - 2 * cap / (exp(2 x) + 1), in bits
        qk = cap - 2.0 * cap * reciprocal(gl.exp2(qk * to_bits) + 1.0)
        to_bits = 1.0
    if MASKED:  # a thread's columns differ by multiples of eight: see `attention_step.attend`
        offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        eighth, within = (offs_n // 8)[None, :], (offs_n % 8)[None, :]
        seen = eighth <= (((last - n)[:, None] - within) >> 3)
        if HAS_WINDOW:
            seen = seen & (eighth >= (((first - n + 7)[:, None] - within) >> 3))
        qk = gl.where(seen, qk, MASKED_SCORE)
    new_peak = gl.maximum(peak, gl.max(qk, 1) * to_bits)
    weights = gl.exp2(qk * to_bits - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return weights, new_peak, shrink, total * shrink + gl.sum(weights, 1)


@gluon.jit
def attend(
    acc,  # [ROWS, BLOCK_D], sums of values of the blocks before i - 1
    weights,  # [ROWS, BLOCK_N], of block i - 1
    peak,
    total,
    i,
    q,
    rings,
    first,
    last,
    n,  # first key of block i
    numbers,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    LAYOUT: gl.constexpr,  # of the scores
    MASKED: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):
    """Add the values of block i - 1, and compute the weights of block i meanwhile."""
    k_bufs, v_bufs, k_full, k_empty, v_full, v_empty = rings
    ACC_LAYOUT: gl.constexpr = acc.type.layout
    # STAGES is a power of two: to divide i, which the compiler has to think may be below 0, takes more instructions.
    at = i & (STAGES - 1)
    at_values = (i - 1) & (STAGES - 1)
    mbarrier.wait(k_full.index(at), (i & STAGES) // STAGES)
    qk = scores(q, k_bufs.index(at), BLOCK_N, BLOCK_D, LAYOUT)
    mbarrier.wait(v_full.index(at_values), ((i - 1) & STAGES) // STAGES)
    sums = warpgroup_mma(weights, v_bufs.index(at_values).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
    qk = warpgroup_mma_wait(1, deps=[qk])
    mbarrier.arrive(k_empty.index(at), count=1)
    new_weights, peak, shrink, total = softmax_step(
        qk, peak, total, first, last, n, numbers, BLOCK_N, LAYOUT, MASKED, HAS_WINDOW, SOFTCAP
    )
    done_before(total)
    acc, weights = warpgroup_mma_wait(0, deps=[sums, weights])
    mbarrier.arrive(v_empty.index(at_values), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
    return acc, gl.convert_layout(new_weights.to(weights.dtype), weights.type.layout), peak, total


@gluon.jit
def scores(q, k_buf, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """q k^T, on its way: [ROWS, BLOCK_N]."""
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=LAYOUT)
    k = k_buf.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
