"""Device functions of packed sequences: which one a token is in, and where a sequence's selected tokens go.

Selecting the k smallest takes ``min(k, tokens)`` of a sequence, whatever the scores. So every program works out from
the lengths alone where its sequence begins in the output, and no program waits for another.
"""

import triton
import triton.language as tl

SEQUENCES = tl.constexpr(256)  # looked at in one step


@triton.jit
def sequences_until(found, places_ptr, n_seqs, step, place, QUERIES: tl.constexpr):
    """``found`` and ``step`` for each of the sequences 0, step, 2 step .. ``n_seqs`` whose place is at most ``place``.

    The one walk over sequences, for a scalar ``place``; `count_below` is for a block of them. The places ascend: those
    at ``places_ptr``, or with QUERIES the first tiles of sequences that own tiles of so many queries from
    ``places[s] // QUERIES + s`` on. All are looked at, 256 at a time, by loads that do not wait for each other.
    """
    found += tl.zeros([], tl.int32)
    for first in range(0, (n_seqs + step - 1) // step, SEQUENCES):
        seq = (first + tl.arange(0, SEQUENCES)) * step  # [SEQUENCES]
        if QUERIES is None:
            at = tl.load(places_ptr + seq, mask=seq < n_seqs, other=0x7FFFFFFF)
            found += step * tl.sum((at <= place).to(tl.int32), 0)
        else:
            at = tl.load(places_ptr + seq, mask=seq < n_seqs, other=0) // QUERIES + seq
            found += step * tl.sum(((seq < n_seqs) & (at <= place)).to(tl.int32), 0)
    return found


@triton.jit
def count_below(values_ptr, n, bound):
    """How many of ``n`` ascending int32 values are less than ``bound`` (int32, a scalar or a block): a binary search.

    For ``values = cu_seqlens[1:]`` and ``bound = row + 1`` that is the sequence that holds the row; empty sequences are
    passed over.
    """
    found = bound * 0
    step = tl.minimum(n, 1)
    while (step > 0) & (step <= n // 2):
        step *= 2
    while step > 0:
        reach = tl.minimum(found + step, n)
        found = tl.where(tl.load(values_ptr + reach - 1) < bound, reach, found)
        step //= 2
    return found


@triton.jit
def sink_of(sinks_ptr, offsets_ptr, seq):
    """The sink's index in the sequences ``seq``, -1 = it is not there. By default it is the token at position 0."""
    if sinks_ptr is not None:
        return tl.maximum(tl.load(sinks_ptr + seq), -1)
    if offsets_ptr is not None:
        return tl.where(tl.load(offsets_ptr + seq) == 0, 0, -1)
    return seq.to(tl.int32) * 0


@triton.jit
def quota(cu_seqlens_ptr, seq_k_ptr, seq, n_seqs, k):
    """How many tokens each of the sequences ``seq`` [BLOCK] selects if the output has room for all."""
    inside = seq < n_seqs
    begin = tl.load(cu_seqlens_ptr + seq, mask=inside, other=0)
    end = tl.load(cu_seqlens_ptr + seq + 1, mask=inside, other=0)
    taken = tl.minimum(end - begin, k)  # [BLOCK]
    if seq_k_ptr is not None:
        wanted = tl.load(seq_k_ptr + seq, mask=inside, other=0)
        taken = tl.minimum(tl.maximum(wanted, 0), taken).to(tl.int32)
    return taken


@triton.jit
def quotas_around(cu_seqlens_ptr, seq_k_ptr, seq, n_seqs, k):
    """Tokens that the sequences before ``seq`` select, that it selects, and that all select."""
    before = 0
    own = 0
    total = 0
    for tile in range(0, n_seqs, SEQUENCES):
        other = tile + tl.arange(0, SEQUENCES)  # [SEQUENCES]
        taken = quota(cu_seqlens_ptr, seq_k_ptr, other, n_seqs, k)
        before += tl.sum(tl.where(other < seq, taken, 0), 0)
        own += tl.sum(tl.where(other == seq, taken, 0), 0)
        total += tl.sum(taken, 0)
    return before, own, total


@triton.jit
def write_quotas(positions_ptr, rows_ptr, counts_ptr, cu_selected_ptr, cu_seqlens_ptr, seq_k_ptr, n_seqs, k, width):
    """The counts of all sequences, their sums, and the -1 of slots that lie past all tokens: for one program."""
    tl.store(cu_selected_ptr, 0)
    total = 0
    for tile in range(0, n_seqs, SEQUENCES):
        seq = tile + tl.arange(0, SEQUENCES)  # [SEQUENCES]
        inside = seq < n_seqs
        taken = quota(cu_seqlens_ptr, seq_k_ptr, seq, n_seqs, k)
        end = total + tl.cumsum(taken, 0)
        first = tl.minimum(end - taken, width)
        end = tl.minimum(end, width)
        tl.store(counts_ptr + seq, end - first, mask=inside)
        tl.store(cu_selected_ptr + 1 + seq, end, mask=inside)
        total += tl.sum(taken, 0)
    fill_missing(positions_ptr, rows_ptr, tl.maximum(total, tl.load(cu_seqlens_ptr + n_seqs)), width)


@triton.jit
def fill_missing(positions_ptr, rows_ptr, first, end):
    """-1 in the slots from ``first`` to ``end``."""
    for tile in range(first, end, 256):
        slot = tile + tl.arange(0, 256)
        tl.store(positions_ptr + slot, -1, mask=slot < end)
        if rows_ptr is not None:
            tl.store(rows_ptr + slot, -1, mask=slot < end)
