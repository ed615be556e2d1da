"""What may be dropped from a kernel and not be noticed, each with the reason why it is harmless.

A line is not a licence: it says how many mutants of one case it excuses on each target, and `test_mutations` allows no
more. Mutants that are noticed once others are gone (`redundant`) are not here.
"""

from typing import Any, NamedTuple

REASONS = {
    "row": "a missing entry has a row of its own, which is read and not stored",
    "zeros": "cos and sin of a missing entry are zeros, and so is what it is turned into",
    "scalar": "every thread would store the same scalar to the same place",
    "one thread": "one thread stores all scores of a program and does the atomic, whose own barriers stand beside; AMD "
    "needs it, as the kernel says",
    "beside": "sums before or behind it have barriers of their own, which the kernel's text does not count on",
    "one step": "keeps apart two steps of a loop over 256 sequences; here there is one step. In select_tokens, which "
    "calls the same function, a case of 258 sequences notices it",
    "twice": "64 channels on 128 threads: two hold each, and both would store the same",
    "loop": "stands at the end of a loop over keys, or between its stages, where the compiler puts several: the "
    "next step, or what follows the loop, has one of its own. Without all of these at once, longer loops "
    "pass too",
    "one warp": "orders steps of the one warp that initialises, arrives and copies",
    "stored": "nothing was stored to shared memory since the fence before it",
    "waited": "ends a loop, whose last step has waited already",
    "again": "the stores before it are waited for once more before the product reads them, or there are none: a "
    "product that reads what is in flight is noticed",
    "program": "ends the program: what follows gives back memory that nobody uses any more",
    "order": "holds the order of two instructions in machine code; in PTX they have it already",
    "unread": "nothing was read of a block that is let go",
    "later": "the warp that copies waits for the values of the block before as well, and their barrier comes later",
    "free": "at the start all places are free: the wait ends at once",
    "one program": "a program counts itself and no other here, so it is the last whatever its other threads add; "
    "with several of a row it is noticed",
    "sum": "keeps apart two steps of the search among 256 sequences; here there is one step",
}


class Harmless(NamedTuple):
    """Mutants of one case: their kind, the line of the kernel's source, how many on sm_80, sm_90, sm_100, and why."""

    case: str
    kind: str
    line: str
    counts: tuple[int, int, int]
    why: str

    def excuses(self, result: dict[str, Any]) -> bool:
        where = result["line"] or result["source"]
        return (self.case, self.kind) == (result["case"], result["kind"]) and where.startswith(self.line)

    def count(self, target: str) -> int:
        return self.counts[("sm_80", "sm_90", "sm_100").index(target)]


SCATTER = "scatter_rows_, hidden 200, bfloat16"
ROTARY = "apply_rotary_at, 2 heads of 80, 32 turned, float32"
CACHED = "apply_rotary_and_cache_, 2 heads of 80, 32 turned, float32"
SCORE = "rms_norm_score, own sink, several rows a program, bfloat16"
SELECT = "rms_norm_select, own sink, several rows a program, bfloat16"
COUNTED = "rms_norm_select, scores counted, bfloat16"
PACKED = "rms_norm_select, packed, float32"
SCORE_AHEAD = "rms_norm_score, residual, many rows a program, bfloat16"
SELECT_AHEAD = "rms_norm_select, many rows a program, bfloat16"
RAGGED = "select_tokens, ragged, float32"
THRESHOLD = "select_tokens, 9001 tokens, threshold, float32"
PACKED_ALONE = "select_tokens, packed, float32"
TILE = "sparse_query_attention, dim 64, one tile, bfloat16"
WINDOW = "sparse_query_attention, dim 128, window and padding, float16"
SPLIT = "sparse_query_attention, split keys, float32"
PAGED = "sparse_query_attention_paged, e5m2, bfloat16"
HOPPER = "sparse_query_attention, hopper, dim 64, padding, bfloat16"
HARMLESS = (
    Harmless(SCATTER, "bound", "row = tl.load(rows_ptr + columns, mask=mask)  # [B", (6, 6, 6), "row"),
    Harmless(ROTARY, "bound", "x1 = tl.load(x + columns, mask=read, other=0.0).to", (1, 1, 1), "zeros"),
    Harmless(ROTARY, "bound", "x2 = tl.load(x + HALF + columns, mask=read, other=", (1, 1, 1), "zeros"),
    Harmless(CACHED, "bound", "values = tl.load(values_ptr + far_heads * stride_v", (1, 1, 1), "row"),
    Harmless(CACHED, "bound", "x1 = tl.load(x + columns, mask=read, other=0.0).to", (1, 1, 1), "row"),
    Harmless(CACHED, "bound", "x2 = tl.load(x + HALF + columns, mask=read, other=", (1, 1, 1), "row"),
    Harmless(SCORE, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 1), "scalar"),
    Harmless(SELECT, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 1), "scalar"),
    Harmless(SELECT, "barrier", "tl.debug_barrier()", (2, 2, 2), "one thread"),
    Harmless(SELECT, "bound", "tl.store(done_ptr, 0)", (1, 1, 1), "scalar"),
    Harmless(SELECT, "bound", "tl.store(counts_ptr + seq, count)", (1, 1, 1), "scalar"),
    Harmless(COUNTED, "barrier", "x *= tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)", (1, 1, 1), "beside"),
    Harmless(COUNTED, "bound", "tl.store(normed_ptr + out * HIDDEN + channel, norm", (1, 1, 1), "twice"),
    Harmless(COUNTED, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 1), "scalar"),
    Harmless(COUNTED, "barrier", "tl.debug_barrier()", (4, 4, 4), "beside"),
    Harmless(COUNTED, "bound", "tl.store(done_ptr, 0)", (1, 1, 1), "scalar"),
    Harmless(COUNTED, "bound", "tl.store(counts_ptr + seq, count)", (1, 1, 1), "scalar"),
    Harmless(PACKED, "bound", "tl.store(cu_selected_ptr, 0)", (1, 1, 1), "scalar"),
    Harmless(PACKED, "barrier", "end = total + tl.cumsum(taken, 0)", (1, 1, 1), "one step"),
    Harmless(PACKED, "bound", "tl.store(normed_ptr + out * HIDDEN + channel, norm", (1, 1, 1), "twice"),
    Harmless(PACKED, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 1), "scalar"),
    Harmless(PACKED, "barrier", "tl.debug_barrier()", (2, 2, 2), "one thread"),
    Harmless(PACKED, "bound", "tl.store(done_ptr, 0)", (1, 1, 1), "scalar"),
    Harmless(SCORE_AHEAD, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 1), "scalar"),
    Harmless(SCORE_AHEAD, "wait for copies", "for token in tl.range(first, end, num_stages=STA", (1, 1, 1), "program"),
    Harmless(SCORE_AHEAD, "barrier", "for token in tl.range(first, end, num_stages=STA", (1, 1, 1), "program"),
    Harmless(SELECT_AHEAD, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 1), "scalar"),
    Harmless(SELECT_AHEAD, "barrier", "for token in tl.range(first, end, num_stages=STA", (1, 1, 1), "beside"),
    Harmless(SELECT_AHEAD, "barrier", "tl.debug_barrier()", (2, 2, 2), "one thread"),
    Harmless(SELECT_AHEAD, "bound", "before = tl.atomic_add(done_ptr, done.to(tl.int32)", (1, 1, 1), "one program"),
    Harmless(SELECT_AHEAD, "barrier", "before = tl.atomic_add(done_ptr, done.to(tl.int32)", (1, 1, 1), "beside"),
    Harmless(SELECT_AHEAD, "bound", "tl.store(done_ptr, 0)", (1, 1, 1), "scalar"),
    Harmless(SELECT_AHEAD, "bound", "tl.store(counts_ptr + seq, count)", (1, 1, 1), "scalar"),
    Harmless(RAGGED, "bound", "tl.store(counts_ptr + seq, count)", (1, 1, 1), "scalar"),
    Harmless(THRESHOLD, "bound", "tl.store(counts_ptr + seq, count)", (1, 1, 1), "scalar"),
    Harmless(PACKED_ALONE, "bound", "tl.store(cu_selected_ptr, 0)", (1, 1, 1), "scalar"),
    Harmless(TILE, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 8, 8), "loop"),
    Harmless(TILE, "barrier", "k = k_desc.load([batch, kv_head, key_base + n, 0])", (0, 3, 3), "one warp"),
    Harmless(TILE, "barrier", "v = v_desc.load([batch, kv_head, key_base + n, 0])", (0, 1, 1), "one warp"),
    Harmless(TILE, "fence", "k = k_desc.load([batch, kv_head, key_base + n, 0])", (0, 1, 1), "stored"),
    Harmless(WINDOW, "barrier", "for n in range(begin, tl.minimum(middle, end), BLO", (1, 0, 1), "loop"),
    Harmless(WINDOW, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 4, 8), "loop"),
    Harmless(WINDOW, "fence", "acc = tl.dot(weights.to(v.dtype), v, acc, input_pr", (0, 2, 0), "stored"),
    Harmless(WINDOW, "wait for products", "acc, total, peak = attend(", (0, 1, 0), "waited"),
    Harmless(WINDOW, "barrier", "acc, total, peak = attend(", (0, 2, 0), "loop"),
    Harmless(WINDOW, "fence", "k = k_desc.load([batch, kv_head, key_base + n, 0])", (0, 1, 1), "stored"),
    Harmless(WINDOW, "barrier", "k = k_desc.load([batch, kv_head, key_base + n, 0])", (0, 2, 4), "one warp"),
    Harmless(WINDOW, "barrier", "v = v_desc.load([batch, kv_head, key_base + n, 0])", (0, 2, 3), "one warp"),
    Harmless(WINDOW, "fence", 'qk = tl.dot(q, tl.trans(k), input_precision="ieee"', (0, 1, 7), "stored"),
    Harmless(WINDOW, "barrier", "return tl.load(ptrs)", (0, 0, 8), "loop"),
    Harmless(WINDOW, "barrier", 'qk = tl.dot(q, tl.trans(k), input_precision="ieee"', (0, 0, 10), "loop"),
    Harmless(WINDOW, "wait for products", "acc = tl.dot(weights.to(v.dtype), v, acc, input_pr", (0, 0, 5), "again"),
    Harmless(WINDOW, "barrier", "acc = tl.dot(weights.to(v.dtype), v, acc, input_pr", (0, 0, 6), "loop"),
    Harmless(WINDOW, "barrier", "def sparse_query_attention_kernel(", (0, 0, 1), "program"),
    Harmless(SPLIT, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 1, 1), "loop"),
    Harmless(SPLIT, "wait for copies", "for n in range(unmasked_end, end, BLOCK_N):", (1, 1, 1), "waited"),
    Harmless(SPLIT, "barrier", "for n in range(unmasked_end, end, BLOCK_N):", (1, 1, 1), "loop"),
    Harmless(PAGED, "barrier", "found += step * tl.sum(((seq < n_seqs) & (at <= pl", (1, 1, 1), "sum"),
    Harmless(PAGED, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 1, 1), "loop"),
    Harmless(HOPPER, "barrier", "gl.inline_asm_elementwise(", (0, 8, 0), "order"),
    Harmless(HOPPER, "barrier", "mbarrier.arrive(k_empty.index(i % STAGES)", (0, 1, 0), "unread"),
    Harmless(HOPPER, "barrier", "mbarrier.arrive(v_empty.index(i % STAGES)", (0, 1, 0), "unread"),
    Harmless(HOPPER, "barrier", "mbarrier.arrive(k_empty.index(at)", (0, 4, 0), "later"),
    Harmless(HOPPER, "barrier", "mbarrier.expect(k_full.index(at)", (0, 2, 0), "one warp"),
    Harmless(HOPPER, "barrier", "async_load(desc, ", (0, 3, 0), "one warp"),
    Harmless(HOPPER, "barrier", "mbarrier.expect(v_full.index(at)", (0, 1, 0), "one warp"),
    Harmless(HOPPER, "fence", "async_load(desc, ", (0, 1, 0), "stored"),
    # The assembly of a wait counts its own lines: four lines on in the source.
    Harmless(HOPPER, "wait for an mbarrier", "consumer.py:160", (0, 1, 0), "unread"),
    Harmless(HOPPER, "wait for an mbarrier", "mbarrier.wait(v_empty.index(at)", (0, 1, 0), "free"),
)  # fmt: skip


def unexplained(target: str, missed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the mutants that nobody noticed, those that the list does not excuse."""
    left, used = [], dict.fromkeys(HARMLESS, 0)
    for result in missed:
        one = next((h for h in HARMLESS if h.excuses(result) and used[h] < h.count(target)), None)
        if one is None:
            left.append(result)
        else:
            used[one] += 1
    return left
