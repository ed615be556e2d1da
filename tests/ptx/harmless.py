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
    "one step": "keeps apart two steps of a loop over 256 sequences; here there is one step. In select_tokens, which "
    "calls the same function, a case of 258 sequences notices it",
    "twice": "64 channels on 128 threads: two hold each, and both would store the same",
    "loop": "stands at the end of a loop over keys, or between its stages, where the compiler puts several: the "
    "next step, or what follows the loop, has one of its own. Without all of these at once, longer loops "
    "pass too",
    "waited": "ends a loop, whose last step has waited already",
    "one warp": "orders steps of the one warp that initialises, arrives and copies",
    "stored": "nothing was stored to shared memory since the fence before it",
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
SCORE = "rms_norm_score, own sink, several rows a program, bfloat16"
SELECT = "rms_norm_select, own sink, several rows a program, bfloat16"
PACKED = "rms_norm_select, packed, float32"
RAGGED = "select_tokens, ragged, float32"
THRESHOLD = "select_tokens, 9001 tokens, threshold, float32"
PACKED_ALONE = "select_tokens, packed, float32"
TILE = "sparse_query_attention, dim 64, one tile, bfloat16"
WINDOW = "sparse_query_attention, dim 128, window and padding, float16"
SPLIT = "sparse_query_attention, split keys, float32"
HARMLESS = (
    Harmless(SCATTER, "bound", "row = tl.load(rows_ptr + columns, mask=mask)  # [BLOCK]", (6, 6, 0), "row"),
    Harmless(ROTARY, "bound", "x1 = tl.load(x + columns[None, :], mask=read, other=0.0).to(", (1, 1, 0), "zeros"),
    Harmless(ROTARY, "bound", "x2 = tl.load(x + HALF + columns[None, :], mask=read, other=0", (1, 1, 0), "zeros"),
    Harmless(SCORE, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 0), "scalar"),
    Harmless(SELECT, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 0), "scalar"),
    Harmless(SELECT, "barrier", "tl.debug_barrier()", (2, 2, 0), "one thread"),
    Harmless(SELECT, "bound", "tl.store(done_ptr, 0)", (1, 1, 0), "scalar"),
    Harmless(SELECT, "bound", "tl.store(counts_ptr + row, count)", (1, 1, 0), "scalar"),
    Harmless(PACKED, "bound", "tl.store(cu_selected_ptr, 0)", (1, 1, 0), "scalar"),
    Harmless(PACKED, "barrier", "end = total + tl.cumsum(taken, 0)", (1, 1, 0), "one step"),
    Harmless(PACKED, "bound", "tl.store(normed_ptr + out * HIDDEN + channel, normed, mask=i", (1, 1, 0), "twice"),
    Harmless(PACKED, "bound", "tl.store(scores_ptr + out, score)", (1, 1, 0), "scalar"),
    Harmless(PACKED, "barrier", "tl.debug_barrier()", (2, 2, 0), "one thread"),
    Harmless(PACKED, "bound", "tl.store(done_ptr, 0)", (1, 1, 0), "scalar"),
    Harmless(RAGGED, "bound", "tl.store(counts_ptr + row, count)", (1, 1, 0), "scalar"),
    Harmless(THRESHOLD, "bound", "tl.store(counts_ptr + row, count)", (1, 1, 0), "scalar"),
    Harmless(PACKED_ALONE, "bound", "tl.store(cu_selected_ptr, 0)", (1, 1, 0), "scalar"),
    Harmless(TILE, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 8, 0), "loop"),
    Harmless(WINDOW, "barrier", "for n in range(begin, tl.minimum(middle, end), BLOCK_N):", (1, 0, 0), "loop"),
    Harmless(WINDOW, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 0, 0), "loop"),
    Harmless(SPLIT, "barrier", "for n in range(middle, unmasked_end, BLOCK_N):", (1, 0, 0), "loop"),
    Harmless(SPLIT, "wait for copies", "for n in range(unmasked_end, end, BLOCK_N):", (1, 0, 0), "waited"),
    Harmless(SPLIT, "barrier", "for n in range(unmasked_end, end, BLOCK_N):", (1, 0, 0), "loop"),
    Harmless(TILE, "barrier", "k = k_desc.load([batch, kv_head, key_base + n, 0]).reshape(B", (0, 3, 0), "one warp"),
    Harmless(TILE, "barrier", "v = v_desc.load([batch, kv_head, key_base + n, 0]).reshape(B", (0, 1, 0), "one warp"),
    Harmless(TILE, "fence", "k = k_desc.load([batch, kv_head, key_base + n, 0]).reshape(B", (0, 1, 0), "stored"),
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
