"""Random scores that depend on nothing but a seed, a layer and a token's position in its row.

A counter-based hash in integer arithmetic: the same bits on every device and in every batch, whichever tokens stand
beside it, so a random selection of a row alone is that of the row in a batch. Selection by it is the baseline of the
paper's Table 3.
"""

from typing import TypeVar

from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # 32 bits, in a Python int or in an int64 tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # added before each round, since `mix` leaves 0 as it is
MULTIPLIERS = 0x21F0AAAD, 0x735A2D97  # both below 2**31: no product of theirs overflows an int64


def mix(word: Word) -> Word:
    """A bijection of the 32-bit words in which every bit of the result depends on every bit of ``word``.

    Two rounds of shift, exclusive or and multiplication; the constants are those that C. Wellons' search for hash
    functions of low bias found ("hash-prospector", public domain).
    """
    first, second = MULTIPLIERS
    word = word ^ (word >> 16)
    word = (word * first) & MASK
    word = word ^ (word >> 15)
    word = (word * second) & MASK
    return word ^ (word >> 15)


def position_hash(positions: Tensor, *, seed: int, layer: int) -> Tensor:
    """32 random bits for each position.

    Args:
        positions: integers of any shape: the tokens' places in their rows, the first valid token at 0.
        seed: 0 or more, of any size; layer: the layer's number, 0 or more.

    Returns:
        int64, like ``positions``, from 0 to 2^32 - 1, a function of the three numbers alone.

    Raises:
        ValueError: ``seed`` or ``layer`` is negative.

    Example:
        >>> import torch
        >>> position_hash(torch.arange(3), seed=0, layer=12).tolist()
        [2319079103, 1208697998, 3433911829]
    """
    if seed < 0 or layer < 0:
        raise ValueError(f"seed is {seed} and layer is {layer}; both must be 0 or more")
    key = _key(_key(0, seed), layer)
    words = mix((positions.long() + GOLDEN) & MASK)
    return mix(words ^ key)


def random_scores(positions: Tensor, *, seed: int, layer: int) -> Tensor:
    """A score for each position, float32 from 0 to below 1: the upper 24 bits of `position_hash`, exactly.

    Args and errors as for `position_hash`. Two tokens have equal scores with a probability of 2^-24.

    Example:
        >>> import torch
        >>> scores = random_scores(torch.arange(1000), seed=7, layer=3)
        >>> bool((scores < 1 / 3).sum() in range(280, 387))
        True
    """
    return (position_hash(positions, seed=seed, layer=layer) >> 8).float() * 2.0**-24


def _key(key: int, number: int) -> int:
    """``key`` with all 32-bit words of ``number`` mixed in."""
    while True:
        key = mix((key ^ (number & MASK)) + GOLDEN & MASK)
        number >>= 32
        if number == 0:
            return key
