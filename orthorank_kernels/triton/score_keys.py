"""Device functions of the order in which tokens are selected: a key for each, and the histogram of a row's keys.

Every token gets a 32-bit key, smallest first. The programs of `rms_norm_select` that score a long row count its keys in
bins, so that the one which selects knows at once in which bin the k-th token is (`radix.find_binned`). Counts are
integers, so the order of the programs does not matter.
"""

import triton
import triton.language as tl

from orthorank_kernels.layout import SCORE_BINS
from orthorank_kernels.triton.primitives import ascending_key

# Keys: the last `keep_last` tokens take 0, 1, 2, ... from the end, below the 0x00800000 of -inf; then come the scores,
# and above the 0xFF800000 of +inf stand these. A row selects at most its valid tokens, so PADDING is never reached.
NAN = tl.constexpr(0xFFFFFFFD)
SINK = tl.constexpr(0xFFFFFFFE)
PADDING = tl.constexpr(0xFFFFFFFF)
# Scores are not negative, so keys are 0x80000000 | bits. Five bits of the mantissa and a range of 32 exponents make the
# bins: each at most 1/32 of its scores wide, from 2 ** -18 to 2 ** 14; the first and the last hold what lies beyond.
SCORES = tl.constexpr(SCORE_BINS)
SHIFT = tl.constexpr(18)
FIRST_BIN = tl.constexpr((1 << 13) + (109 << 5))


@triton.jit
def is_valid(token, n_valid):
    """Whether ``token``, counted from the first valid one, is one of them; false for negative tokens too."""
    return token.to(tl.uint32) < n_valid.to(tl.uint32)


@triton.jit
def key_of(score, token, n_valid, sink, keep_last):
    """Key (uint32) of a valid token, or of a block of them."""
    key = tl.where(score == score, ascending_key(score), NAN)
    key = tl.where(token >= n_valid - keep_last, (n_valid - 1 - token).to(tl.uint32), key)
    return tl.where(token == sink, SINK, key)


@triton.jit
def load_keys(scores_ptr, index, lead, n_valid, sink, keep_last, LARGEST: tl.constexpr):
    """Keys (uint32) of the tokens at ``index`` [BLOCK], which counts from ``lead`` before the first valid token."""
    token = index - lead  # [BLOCK]
    valid = is_valid(token, n_valid)
    score = tl.load(scores_ptr + index, mask=valid, other=0.0)
    if LARGEST:
        score = -score
    return tl.where(valid, key_of(score, token, n_valid, sink, keep_last), PADDING)  # [BLOCK]


@triton.jit
def bin_of(key):
    """The bin of a key, or of a block of them; ascends with it."""
    return tl.minimum(tl.maximum((key >> SHIFT).to(tl.int32) - FIRST_BIN, 0), SCORES - 1)


@triton.jit
def count_score(bins_ptr, score, token, n_valid, sink, keep_last):
    """Add a token to the histogram of its row, if it is a valid one. All are scalars.

    One thread does it, the one that stores the score: see `norm_selection.is_last`.
    """
    key = key_of(score, token, n_valid, sink, keep_last)
    tl.atomic_add(bins_ptr + bin_of(key), 1, mask=is_valid(token, n_valid), sem="relaxed")
