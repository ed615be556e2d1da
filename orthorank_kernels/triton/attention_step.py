"""One step of the attention kernel: a block of keys and values is loaded and attended to. Device functions."""

import triton
import triton.language as tl

# A masked score. Finite, because with a window a query may see nothing of a block, and -inf minus -inf is NaN. A power
# of two, because times the scale it must round to itself, or a fused multiply-add would leave a remainder.
MASKED_SCORE = tl.constexpr(-(2.0**100))


@triton.jit
def from_fp8(x, FP8: tl.constexpr):
    """Bytes of fp8 numbers as float16, exactly; e4m3 numbers come out divided by 256.

    The five exponent bits of float16 hold the four of e4m3 as they are, which is this factor, subnormals included: the
    kernel multiplies it into a scale. The two NaN codes of e4m3 come out as 480. Written out because the conversion
    that the language has needs sm_89.
    """
    if FP8 == "e5m2":
        bits = x.to(tl.uint16) << 8
    else:
        bits = x.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def load_rows(
    ptr,
    rows,
    offs_d,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Rows of K or V: [BLOCK_N, BLOCK_D], zeros past HEAD_DIM."""
    if WIDE:
        rows = rows.to(tl.int64)
    ptrs = ptr + rows[:, None] * STRIDE + offs_d[None, :]
    if VECTOR > 1:
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, [1, 16]), [1, VECTOR])
    if HEAD_DIM == offs_d.shape[0]:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def load_paged_rows(
    ptr,
    pages,
    slots,
    offs_d,
    stride_page,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Rows of a paged K or V, each from a page of its own: [BLOCK_N, BLOCK_D], zeros past HEAD_DIM."""
    if WIDE:
        slots = slots.to(tl.int64)
    ptrs = ptr + (pages.to(tl.int64) * stride_page + slots * STRIDE)[:, None] + offs_d[None, :]
    if VECTOR > 1:
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, [1, 16]), [1, VECTOR])
    if HEAD_DIM == offs_d.shape[0]:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def attend(
    acc,  # [BLOCK_M, BLOCK_D] weighted sum of values so far
    total,  # [BLOCK_M] sum of weights so far
    peak,  # [BLOCK_M] largest score so far, in bits
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    table_ptr,
    batch,
    kv_head,
    key_base,  # what a descriptor's key 0 is short of the sequence's key 0
    n,  # first key of the block
    first,  # [BLOCK_M] first key that each query sees
    last,  # [BLOCK_M] last key that each query sees
    lowest,  # first key that some query of the tile sees
    high,  # last key that some query of the tile sees
    to_bits,  # q k to bits, or with SOFTCAP to what its exponential takes; one number, with FP8 [BLOCK_M]
    cap,  # with SOFTCAP: the largest score, in bits
    stride_k_page,
    stride_v_page,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One step of the online softmax: the keys n .. n + BLOCK_N."""
    ONE_PAGE: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    key = n + offs_n
    # Rows past `high`, and in pages those before `lowest`, are clamped, not masked off: they are never read, and the
    # loads keep their full width.
    rows = tl.minimum(key, high) if MASKED else key
    if ONE_PAGE:
        if MASKED and HAS_WINDOW:
            rows = tl.maximum(rows, lowest)
        page = tl.load(table_ptr + n // PAGE_SIZE).to(tl.int64)
        k_ptr += page * stride_k_page
        v_ptr += page * stride_v_page
        rows -= n // PAGE_SIZE * PAGE_SIZE
    elif PAGE_SIZE > 0:
        pages = tl.load(table_ptr + rows // PAGE_SIZE)
        rows = rows % PAGE_SIZE
    if TMA and not MASKED:
        k = k_desc.load([batch, kv_head, key_base + n, 0]).reshape(BLOCK_N, BLOCK_D)
    elif PAGE_SIZE > 0 and not ONE_PAGE:
        k = load_paged_rows(k_ptr, pages, rows, offs_d, stride_k_page, STRIDE_K, HEAD_DIM, WIDE, VECTOR)
    else:
        k = load_rows(k_ptr, rows, offs_d, STRIDE_K, HEAD_DIM, WIDE, VECTOR)
    if FP8 != "":
        k = from_fp8(k, FP8).to(q.dtype)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    column = to_bits[:, None] if FP8 != "" else to_bits
    if SOFTCAP:  # softcap * tanh(x) = softcap * (1 - 2 / (exp(2 x) + 1)), also where the exponential is 0 or infinite
        qk = cap - 2.0 * cap / (tl.math.exp2(qk * column) + 1.0)
    if MASKED:
        if TMA:
            seen = key[None, :] <= last[:, None]
        else:  # the same; keeps the columns in registers, which saves instructions and with TMA costs 40 registers
            seen = offs_n[None, :] <= (last - n)[:, None]
        if HAS_WINDOW:
            seen = seen & (key[None, :] >= first[:, None])
        qk = tl.where(seen, qk, MASKED_SCORE)
    if SOFTCAP:
        new_peak = tl.maximum(peak, tl.max(qk, 1))
        weights = tl.math.exp2(qk - new_peak[:, None])
    else:
        new_peak = tl.maximum(peak, tl.max(qk, 1) * to_bits)
        weights = tl.math.exp2(qk * column - new_peak[:, None])
    shrink = tl.math.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if TMA and not MASKED:
        v = v_desc.load([batch, kv_head, key_base + n, 0]).reshape(BLOCK_N, BLOCK_D)
    elif PAGE_SIZE > 0 and not ONE_PAGE:
        v = load_paged_rows(v_ptr, pages, rows, offs_d, stride_v_page, STRIDE_V, HEAD_DIM, WIDE, VECTOR)
    else:
        v = load_rows(v_ptr, rows, offs_d, STRIDE_V, HEAD_DIM, WIDE, VECTOR)
    if FP8 != "":
        v = from_fp8(v, FP8).to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_peak
