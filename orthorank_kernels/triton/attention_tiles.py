"""Which queries, heads and keys a program of the attention kernel has: device functions.

A tile holds QUERIES = BLOCK_M // PACK queries times PACK query heads of one key/value head. The queries of a batch row
or sequence fill its tiles from the last one backwards, so tile 0 has the last queries, and the tile that is not full
is the one with the fewest keys.
"""

import triton
import triton.language as tl

from orthorank_kernels.triton.packing import sequences_until

SEARCH = tl.constexpr(256)  # sequences that one step of the search reads


@triton.jit
def find_work(program, tiles, columns, lanes, together, splits, SPLIT: tl.constexpr):
    """Batch row, column of heads, tile and split of a program, so that the longest work begins first.

    A lane is a column of heads of one batch row. Of ``together`` lanes, whose keys and values the L2 cache holds, the
    programs of tile 0 come first, which have most keys, then those of tile 1; then the next lanes.
    """
    if not SPLIT:
        splits = 1
    group = program // (tiles * together * splits)
    program -= group * (tiles * together * splits)
    first = group * together
    size = tl.minimum(together, lanes - first)
    tile = program // (size * splits)
    program -= tile * (size * splits)
    lane = first + program // splits
    batch = lane // columns
    return batch, lane - batch * columns, tile, program % splits


@triton.jit
def tiles_of(cu_selected_ptr, sequence, end, n_seqs, n_queries, QUERIES: tl.constexpr):
    """How many tiles the sequences ``sequence`` [SEARCH] have, those from ``end`` on none."""
    begins = tl.load(cu_selected_ptr + sequence, mask=sequence < end, other=0)
    ends = tl.load(cu_selected_ptr + sequence + 1, mask=sequence < tl.minimum(end, n_seqs), other=n_queries)
    return tl.where(sequence < end, (ends - begins + QUERIES - 1) // QUERIES, 0)


@triton.jit
def tiles_above(cu_selected_ptr, rank, first, end, n_seqs, n_queries, QUERIES: tl.constexpr):
    """How many tiles of the sequences first .. end have a number below ``rank``."""
    count = 0
    for at in range(first, end, SEARCH):
        some = tiles_of(cu_selected_ptr, at + tl.arange(0, SEARCH), end, n_seqs, n_queries, QUERIES)  # [SEARCH]
        count += tl.sum(tl.minimum(some, rank))
    return count


@triton.jit
def find_sequence(cu_selected_ptr, n_seqs, n_queries, tile, together, QUERIES: tl.constexpr):
    """Sequence of a tile of packed queries, its first query and its end, and the tile's number in the sequence.

    Sequence s owns the tiles from ``cu_selected[s] // QUERIES + s`` on: at least as many as it needs, so nobody has to
    count the tiles of the sequences before it. So do ``together`` of them, in which tile 0 of each comes first, then
    tile 1 of those that have one. What lies past the last sequence is one more, number ``n_seqs``, and comes last.
    """
    first = sequences_until(-together, cu_selected_ptr, n_seqs, together, tile, QUERIES)
    past = tile >= tl.load(cu_selected_ptr + n_seqs) // QUERIES + n_seqs
    first = tl.where(past, n_seqs, first)
    end = tl.where(past, n_seqs + 1, tl.minimum(first + together, n_seqs))
    tile -= tl.load(cu_selected_ptr + first) // QUERIES + first
    # The tile's number in its sequence: the largest of which no more tiles have a smaller one.
    longest = 0  # where all have one tile, as in decoding, that is all there is to find
    for at in range(first, end, SEARCH):
        some = tiles_of(cu_selected_ptr, at + tl.arange(0, SEARCH), end, n_seqs, n_queries, QUERIES)  # [SEARCH]
        longest = tl.maximum(longest, tl.max(some))
    low = tile // (end - first)
    high = longest - 1
    while low < high:
        middle = low + (high - low + 1) // 2
        fits = tiles_above(cu_selected_ptr, middle, first, end, n_seqs, n_queries, QUERIES) <= tile
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    place = tile - tiles_above(cu_selected_ptr, low, first, end, n_seqs, n_queries, QUERIES)
    sequence = -1
    for at in range(first, end, SEARCH):
        number = at + tl.arange(0, SEARCH)
        has = (tiles_of(cu_selected_ptr, number, end, n_seqs, n_queries, QUERIES) > low).to(tl.int32)  # [SEARCH]
        sequence += tl.sum(tl.where((has > 0) & (tl.cumsum(has, 0) == place + 1), number + 1, 0))
        place -= tl.sum(has)
    found = sequence >= 0  # else there are fewer tiles than programs for them
    sequence = tl.where(found, sequence, n_seqs)
    query_end = tl.load(cu_selected_ptr + sequence + 1, mask=sequence < n_seqs, other=n_queries)
    begin = tl.where(found, tl.load(cu_selected_ptr + sequence), query_end)
    return sequence, begin, query_end, low


@triton.jit
def tile_rows(row, tile, begin, end, column, GROUP: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query and head of each row of a tile of the queries begin .. end, and whether there is one: [BLOCK_M] each."""
    QUERIES: tl.constexpr = BLOCK_M // PACK
    HEAD_TILES: tl.constexpr = (GROUP + PACK - 1) // PACK
    query = end - (tile + 1) * QUERIES + row // PACK
    group_head = (column % HEAD_TILES) * PACK + row % PACK
    head = (column // HEAD_TILES) * GROUP + group_head
    return query, head, (row < QUERIES * PACK) & (query >= begin) & (group_head < GROUP)


@triton.jit
def visible_keys(
    position,  # [BLOCK_M], -1 for none
    query_offset,
    keys,
    start,  # first key there is
    window,  # how many keys a row sees, or None
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,  # blocks begin at multiples of BLOCK_N
):
    """What the rows of a tile see, as: sees, first, last: [BLOCK_M] each; lowest, begin, middle, unmasked_end, high.

    Some row sees the key ``lowest`` and some the key ``high``, none a key outside. The blocks of begin .. middle and
    unmasked_end .. high are masked, those between every row sees whole. A row that sees nothing (``sees`` is 0) stands
    at ``high`` and computes something finite that nobody uses.
    """
    at = position + query_offset
    last = tl.minimum(at, keys - 1)
    first = tl.zeros_like(position) + start
    if window is not None:
        first = tl.maximum(first, at - window + 1)
    sees = (position >= 0) & (first <= last)
    high = tl.max(tl.where(sees, last, -1))  # -1: no row of this tile sees anything, no loop runs
    last = tl.where(sees, last, high)
    low = tl.min(last)
    begin = start
    middle = start
    if window is not None:
        highest_first = tl.max(tl.where(sees, first, 0))
        begin = tl.min(tl.where(sees, first, highest_first))
        first = tl.where(sees, first, begin)
    lowest = begin
    if window is not None:
        if ALIGNED:
            begin = begin // BLOCK_N * BLOCK_N
        middle = begin + tl.cdiv(tl.maximum(highest_first - begin, 0), BLOCK_N) * BLOCK_N
    unmasked_end = middle + tl.maximum(low + 1 - middle, 0) // BLOCK_N * BLOCK_N
    return sees, first, last, lowest, begin, middle, unmasked_end, high
