"""Device functions of the exact selection: the k tokens of smallest key in one row of scores, in position order.

Every token gets a 32-bit key, smallest first. Four passes of eight bits find the key of the k-th token (radix
selection: a histogram of the digit, the bin that holds the k-th, on to the next digit inside that bin). One scan then
places every token below that key, and as many of those at it as are still needed.
"""

import inspect

import triton
import triton.language as tl

from orthorank_kernels.triton.primitives import ascending_key

# Keys: the last `keep_last` tokens take 0, 1, 2, ... from the end, below the 0x00800000 of -inf; then come the scores,
# and above the 0xFF800000 of +inf stand these. A row selects at most its valid tokens, so PADDING is never reached.
NAN = tl.constexpr(0xFFFFFFFD)
SINK = tl.constexpr(0xFFFFFFFE)
PADDING = tl.constexpr(0xFFFFFFFF)
BITS = tl.constexpr(8)
BINS = tl.constexpr(256)
MASKED_HISTOGRAM = tl.constexpr("mask" in inspect.signature(tl.histogram).parameters)  # since Triton 3.4


@triton.jit
def load_keys(scores_ptr, index, lead, n_valid, sink, keep_last, LARGEST: tl.constexpr):
    """Keys (uint32) of the tokens at ``index`` [BLOCK], which counts from ``lead`` before the first valid token."""
    token = index - lead  # [BLOCK]
    valid = token.to(tl.uint32) < n_valid.to(tl.uint32)  # false for negative tokens too
    score = tl.load(scores_ptr + index, mask=valid, other=0.0)
    if LARGEST:
        score = -score
    key = tl.where(score == score, ascending_key(score), NAN)
    key = tl.where(token >= n_valid - keep_last, (n_valid - 1 - token).to(tl.uint32), key)
    key = tl.where(token == sink, SINK, key)
    return tl.where(valid, key, PADDING)  # [BLOCK]


@triton.jit
def count_digits(digits, counted):
    """How often each value is among the ``digits`` [BLOCK] that are ``counted``: [BINS]."""
    if MASKED_HISTOGRAM:
        return tl.histogram(digits, BINS, mask=counted)
    others = digits.shape[0] - tl.sum(counted.to(tl.int32), 0)  # counted as zeros, and taken off
    return tl.histogram(tl.where(counted, digits, 0), BINS) - tl.where(tl.arange(0, BINS) == 0, others, 0)


@triton.jit
def enter_bin(histogram, need, WIDE: tl.constexpr):
    """The digit whose bin holds the token number ``need`` (counted from 1), and its number inside that bin.

    One reduction gives both: of the bins that end before the token, the last has the largest count, and its successor
    is the digit. WIDE is an unsigned type that holds a count and eight bits.
    """
    ends = tl.cumsum(histogram, 0)  # [BINS]
    packed = (ends.to(WIDE) << BITS) | (tl.arange(0, BINS) + 1).to(WIDE)
    last = tl.max(tl.where(ends < need, packed, 0), 0)
    return (last & (BINS - 1)).to(tl.int32), need - (last >> BITS).to(tl.int32)


@triton.jit
def write_selected(positions_ptr, rows_ptr, position, row, index, below, equal, need, n_below, n_equal):
    """Store the selected of ``index`` [BLOCK], given which keys are below and which at the threshold.

    ``position`` and ``row`` are those of index 0. ``n_below`` and ``n_equal`` count the tokens of earlier blocks;
    returns them with this block's added.
    """
    packed = (below.to(tl.int32) << 16) | equal.to(tl.int32)  # one scan instead of two: a block has < 2^15 tokens
    scan = tl.cumsum(packed, 0)  # [BLOCK]
    rank_equal = n_equal + (scan & 0xFFFF)
    slot = n_below + (scan >> 16) + tl.minimum(rank_equal, need) - 1
    taken = below | (equal & (rank_equal <= need))
    tl.store(positions_ptr + slot, position + index, mask=taken)
    if rows_ptr is not None:
        tl.store(rows_ptr + slot, row + index, mask=taken)
    total = tl.sum(packed, 0)
    return n_below + (total >> 16), n_equal + (total & 0xFFFF)


@triton.jit
def select_resident(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    position,
    row,
    lead,
    n_valid,
    sink,
    k,
    keep_last,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Select from a row of at most BLOCK tokens, read once."""
    index = tl.arange(0, BLOCK)  # [BLOCK]
    key = load_keys(scores_ptr, index, lead, n_valid, sink, keep_last, LARGEST)
    need = k
    threshold = tl.zeros([], tl.uint32)
    known = tl.zeros([], tl.uint32)  # mask of the threshold's bits found so far
    shift = 32
    for _level in range(32 // BITS):  # not unrolled: a third of the code, and of the instruction cache misses
        shift -= BITS
        digits = ((key >> shift) & (BINS - 1)).to(tl.int32)  # [BLOCK]
        histogram = count_digits(digits, (key & known) == threshold)
        digit, need = enter_bin(histogram, need, tl.uint32)
        threshold |= digit.to(tl.uint32) << shift
        known |= (BINS - 1) << shift
    write_selected(positions_ptr, rows_ptr, position, row, index, key < threshold, key == threshold, need, 0, 0)


@triton.jit
def select_streamed(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    position,
    row,
    lead,
    n_valid,
    sink,
    k,
    keep_last,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Select from a row of any number of tokens, read once for each digit and once to write."""
    need = k
    threshold = tl.zeros([], tl.uint32)
    known = tl.zeros([], tl.uint32)
    shift = 32
    for _level in range(32 // BITS):
        shift -= BITS
        histogram = tl.zeros([BINS], tl.int32)
        for tile in range(0, n_valid + lead, 2 * BLOCK):
            index = tile + tl.arange(0, 2 * BLOCK)  # [2 * BLOCK]: counting needs fewer registers than writing
            key = load_keys(scores_ptr, index, lead, n_valid, sink, keep_last, LARGEST)
            digits = ((key >> shift) & (BINS - 1)).to(tl.int32)
            histogram += count_digits(digits, (key & known) == threshold)
        digit, need = enter_bin(histogram, need, tl.uint64)
        threshold |= digit.to(tl.uint32) << shift
        known |= (BINS - 1) << shift
    n_below = 0
    n_equal = 0
    for tile in range(0, n_valid + lead, BLOCK):
        index = tile + tl.arange(0, BLOCK)  # [BLOCK]
        key = load_keys(scores_ptr, index, lead, n_valid, sink, keep_last, LARGEST)
        below, equal = key < threshold, key == threshold
        n_below, n_equal = write_selected(
            positions_ptr, rows_ptr, position, row, index, below, equal, need, n_below, n_equal
        )


@triton.jit
def select_smallest(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    first,
    position,
    row,
    n_valid,
    sink,
    k,
    keep_last,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr = False,
):
    """The k smallest (or largest) of ``n_valid`` scores, which begin ``first`` (int64) elements from ``scores_ptr``.

    Written are their positions, of which the first token has ``position``, and where ``rows_ptr`` is given also their
    rows, of which it has ``row``. ``sink`` and ``keep_last`` count from the first token too. Up to RESIDENT tokens
    stay in registers; more are streamed in tiles of TILE; 0 leaves that path out.
    """
    # Reading starts at the multiple of four below the first valid token: known alignment gives each thread four
    # neighbours, which makes the scans cheap, for any stride and any start.
    aligned = tl.multiple_of(first // 4 * 4, 4)
    lead = (first - aligned).to(tl.int32)
    scores_ptr += aligned
    position -= lead
    row -= lead
    if TILE == 0:
        select_resident(
            scores_ptr, positions_ptr, rows_ptr, position, row, lead, n_valid, sink, k, keep_last, RESIDENT, LARGEST
        )
    elif RESIDENT == 0:
        select_streamed(
            scores_ptr, positions_ptr, rows_ptr, position, row, lead, n_valid, sink, k, keep_last, TILE, LARGEST
        )
    elif n_valid + lead <= RESIDENT:
        select_resident(
            scores_ptr, positions_ptr, rows_ptr, position, row, lead, n_valid, sink, k, keep_last, RESIDENT, LARGEST
        )
    else:
        select_streamed(
            scores_ptr, positions_ptr, rows_ptr, position, row, lead, n_valid, sink, k, keep_last, TILE, LARGEST
        )
