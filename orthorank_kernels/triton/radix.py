"""Device functions of the exact selection: the k tokens of smallest key in one row of scores, in position order.

Four passes of eight bits find the key (`score_keys`) of the k-th token (radix selection: a histogram of the digit, the
bin that holds the k-th, on to the next digit inside that bin). One scan then places every token below that key, and as
many of those at it as are still needed.
"""

import inspect

import triton
import triton.language as tl

from orthorank_kernels.triton.score_keys import PADDING, SCORES, bin_of, load_keys

BITS = tl.constexpr(8)
BINS = tl.constexpr(256)
MASKED_HISTOGRAM = tl.constexpr("mask" in inspect.signature(tl.histogram).parameters)  # since Triton 3.4


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
def find_resident(key, need):
    """The key number ``need`` (counted from 1) of the ``key`` [BLOCK], and its number among those that are equal."""
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
    return threshold, need


@triton.jit
def find_streamed(scores_ptr, lead, n_valid, sink, need, keep_last, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """As `find_resident`, of a row that is read once for each digit."""
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
    return threshold, need


@triton.jit
def find_binned(scores_ptr, bins_ptr, lead, n_valid, sink, k, keep_last, BLOCK: tl.constexpr):
    """As `find_resident`, of a row whose keys were counted from ``bins_ptr`` on, which is zero again afterwards.

    The row is read once, for the keys of the k-th token's bin. They stand where the counts were, and the rest happens
    in registers. Only where one bin holds more than there are bins is the row read for each digit. Within a program a
    barrier is enough between the stores of some threads and the loads of others, on AMD too: they share one cache (in
    `norm_selection.is_last` the threads that load are another program's).
    """
    index = tl.arange(0, SCORES)  # [SCORES]
    ends = tl.cumsum(tl.load(bins_ptr + index), 0)
    chosen = tl.sum((ends < k).to(tl.int32), 0)
    before = tl.max(tl.where(ends < k, ends, 0), 0)
    held = tl.min(tl.where(ends < k, 0x7FFFFFFF, ends), 0) - before
    need = k - before
    tl.debug_barrier()
    if held <= SCORES:
        n_found = 0
        for tile in range(0, n_valid + lead, 2 * BLOCK):
            token = tile + tl.arange(0, 2 * BLOCK)  # [2 * BLOCK]
            key = load_keys(scores_ptr, token, lead, n_valid, sink, keep_last, False)
            found = (bin_of(key) == chosen) & (key != PADDING)
            slot = n_found + tl.cumsum(found.to(tl.int32), 0) - 1
            tl.store(bins_ptr + slot, key.to(tl.int32, bitcast=True), mask=found)
            n_found += tl.sum(found.to(tl.int32), 0)
        tl.debug_barrier()
        key = tl.load(bins_ptr + index, mask=index < held, other=-1).to(tl.uint32, bitcast=True)
        threshold, need = find_resident(key, need)
        tl.debug_barrier()
    else:
        threshold, need = find_streamed(scores_ptr, lead, n_valid, sink, k, keep_last, BLOCK, False)
    tl.store(bins_ptr + index, 0)
    return threshold, need


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
    threshold, need = find_resident(key, k)
    write_selected(positions_ptr, rows_ptr, position, row, index, key < threshold, key == threshold, need, 0, 0)


@triton.jit
def select_streamed(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    bins_ptr,
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
    """Select from a row of any number of tokens, read once for each digit, or with ``bins_ptr`` once, and to write."""
    if bins_ptr is None:
        threshold, need = find_streamed(scores_ptr, lead, n_valid, sink, k, keep_last, BLOCK, LARGEST)
    else:
        threshold, need = find_binned(scores_ptr, bins_ptr, lead, n_valid, sink, k, keep_last, BLOCK)
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
    bins_ptr,
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
    stay in registers; more are streamed in tiles of TILE; 0 leaves that path out. ``bins_ptr`` is None, or where all
    that are streamed were counted (`score_bins`).
    """
    # Reading starts at the multiple of four below the first valid token: known alignment gives each thread four
    # neighbours, which makes the scans cheap, for any stride and any start.
    aligned = tl.multiple_of(first // 4 * 4, 4)
    lead = (first - aligned).to(tl.int32)
    scores_ptr += aligned
    position -= lead
    row -= lead
    if (TILE == 0) or (RESIDENT == 0):
        fits: tl.constexpr = TILE == 0
    else:
        fits = n_valid + lead <= RESIDENT
    if fits:
        select_resident(
            scores_ptr, positions_ptr, rows_ptr, position, row, lead, n_valid, sink, k, keep_last, RESIDENT, LARGEST
        )
    else:
        select_streamed(
            scores_ptr, positions_ptr, rows_ptr, bins_ptr, position, row, lead, n_valid, sink, k, keep_last, TILE,
            LARGEST,
        )  # fmt: skip
