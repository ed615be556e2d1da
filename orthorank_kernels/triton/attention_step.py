"""One step of the attention kernel: a block of keys and values is loaded and attended to. Device functions."""

import triton
import triton.language as tl

# A masked score. Finite, because with a window a query may see nothing of a block, and -inf minus -inf is NaN. A power
# of two, because times the scale it must round to itself, or a fused multiply-add would leave a remainder.
MASKED_SCORE = tl.constexpr(-(2.0**100))


# Four bytes in one register to four float16 in two: bytes are moved to the upper halves of 16 bits, and of e4m3 numbers
# all but the sign goes one bit down. Two instructions for each number and half of one, where the compiler takes six.
E5M2_TO_HALF = tl.constexpr("prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;")
E4M3_TO_HALF = tl.constexpr("""{
.reg .b32 low, high;
prmt.b32 $0, $2, 0, 0x1404;
prmt.b32 $1, $2, 0, 0x3424;
shr.b32 low, $0, 1;
shr.b32 high, $1, 1;
and.b32 low, low, 0x3f803f80;
and.b32 high, high, 0x3f803f80;
and.b32 $0, $0, 0x80008000;
and.b32 $1, $1, 0x80008000;
or.b32 $0, $0, low;
or.b32 $1, $1, high;
}""")


@triton.jit
def from_fp8(x, FP8: tl.constexpr, VENDOR: tl.constexpr):
    """Bytes of fp8 numbers as float16, exactly; e4m3 numbers come out divided by 256.

    The five exponent bits of float16 hold the four of e4m3 as they are, which is this factor, subnormals included: the
    kernel multiplies it into a scale. The two NaN codes of e4m3 come out as 480. Written out because the conversion
    that the language has needs sm_89.
    """
    if VENDOR == "nvidia":
        ASM: tl.constexpr = E5M2_TO_HALF if FP8 == "e5m2" else E4M3_TO_HALF
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [x], tl.float16, is_pure=True, pack=4)
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
def existing_page(page, n_pages):
    """``page``, or the last one in place of a number that no page has: nothing outside the cache is ever read."""
    return tl.minimum(page.to(tl.uint32), (n_pages - 1).to(tl.uint32))


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
def reciprocal(x, VENDOR: tl.constexpr):
    """1 / x for x of at least 1, to a unit in the last place: one instruction of NVIDIA's, where a division takes six.

    AMD's own (v_rcp_f32) has to be kept apart from its use, which the compiler does not see to in inline assembly.
    """
    if VENDOR == "nvidia":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


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
    n_pages,
    batch,
    kv_head,
    key_base,  # what a descriptor's key 0 is short of the sequence's key 0
    n,  # first key of the block
    first,  # [BLOCK_M] first key that each query sees
    last,  # [BLOCK_M] last key that each query sees
    lowest,  # first key that some query of the tile sees
    high,  # last key that some query of the tile sees
    window,  # None: all keys
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
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    TMA: tl.constexpr,
    VENDOR: tl.constexpr,
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
        if MASKED and window is not None:
            rows = tl.maximum(rows, lowest)
        page = existing_page(tl.load(table_ptr + n // PAGE_SIZE), n_pages).to(tl.int64)
        k_ptr += page * stride_k_page
        v_ptr += page * stride_v_page
        rows -= n // PAGE_SIZE * PAGE_SIZE
    elif PAGE_SIZE > 0:
        pages = existing_page(tl.load(table_ptr + rows // PAGE_SIZE), n_pages)
        rows = rows % PAGE_SIZE
    if TMA and not MASKED:
        k = k_desc.load([batch, kv_head, key_base + n, 0]).reshape(BLOCK_N, BLOCK_D)
    elif PAGE_SIZE > 0 and not ONE_PAGE:
        k = load_paged_rows(k_ptr, pages, rows, offs_d, stride_k_page, STRIDE_K, HEAD_DIM, WIDE, VECTOR)
    else:
        k = load_rows(k_ptr, rows, offs_d, STRIDE_K, HEAD_DIM, WIDE, VECTOR)
    if FP8 != "":
        k = from_fp8(k, FP8, VENDOR).to(q.dtype)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    column = to_bits[:, None] if FP8 != "" else to_bits
    # softcap * tanh(x) = softcap * (1 - 2 / (exp(2 x) + 1)), also where the exponential is 0 or infinite.
    if SOFTCAP and MASKED:
        qk = cap - 2.0 * cap * reciprocal(tl.math.exp2(qk * column) + 1.0, VENDOR)
    if MASKED:
        if VENDOR == "amd":  # whose threads have four neighbouring columns; the other form spills scalar registers
            seen = offs_n[None, :] <= (last - n)[:, None]
            if window is not None:
                seen = seen & (key[None, :] >= first[:, None])
        else:  # the same. A thread's columns differ by multiples of eight, which so become constants of its code:
            # comparing columns themselves takes a register for each, or an addition.
            eighth, within = (offs_n // 8)[None, :], (offs_n % 8)[None, :]
            seen = eighth <= (((last - n)[:, None] - within) >> 3)
            if window is not None:
                seen = seen & (eighth >= (((first - n + 7)[:, None] - within) >> 3))
        qk = tl.where(seen, qk, MASKED_SCORE)
    highest = tl.max(qk, 1)
    if SOFTCAP and MASKED:
        new_peak = tl.maximum(peak, highest)
        power = qk - new_peak[:, None]
    elif SOFTCAP:  # scores rise with q k, so the largest is that of the largest; the others never stand alone
        highest = cap - 2.0 * cap * reciprocal(tl.math.exp2(highest * to_bits) + 1.0, VENDOR)
        new_peak = tl.maximum(peak, highest)
        share = reciprocal(tl.math.exp2(qk * column) + 1.0, VENDOR)
        power = (cap - new_peak)[:, None] - 2.0 * cap * share
    else:
        new_peak = tl.maximum(peak, highest * to_bits)
        power = qk * column - new_peak[:, None]
    weights = tl.math.exp2(power)
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
        v = from_fp8(v, FP8, VENDOR).to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_peak
