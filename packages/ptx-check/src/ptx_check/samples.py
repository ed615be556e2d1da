"""Inputs for instructions, with the edges of every type among them, and how to run an instruction on many of them."""

import itertools
import random
from collections.abc import Sequence

import numpy as np

from ptx_check import exact, snippet

EDGES = {
    16: (0, 1, 2, 3, 7, 15, 16, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234, 0x00FF, 0xFF00, 0x5555),
    32: (0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678, 0xFF0000FF),
    64: (0, 1, 2, 63, 64, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0, 10**18),
}
PAIRS = {bits: list(itertools.product(edges, edges)) for bits, edges in EDGES.items()}
REGISTER = {1: "%p", 16: "%rs", 32: "%r", 64: "%rd"}
BITS = {"f16": 16, "bf16": 16, "f32": 32}

Column = tuple[int, Sequence[int]]  # bits of a source, and its values


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def number(x: int, kind: str) -> int:
    """Bits as an integer of a PTX type."""
    bits = int(kind[1:])
    return signed(x, bits) if kind[0] == "s" else x


def floats(kind: str, count: int = 24) -> list[int]:
    """Zeros of both signs, the smallest and largest numbers, infinities, NaN, neighbours of 1, and random ones."""
    fraction, exponent = exact.FORMATS[kind]
    one = ((1 << (exponent - 1)) - 1) << fraction
    infinity = ((1 << exponent) - 1) << fraction
    edges = [0, 1, (1 << fraction) - 1, 1 << fraction, one - 1, one, one + 1, infinity - 1, infinity, infinity | 1]
    chance = random.Random(0)
    some = [one + chance.randrange(-8 << fraction, 8 << fraction) for _ in range(count)]
    sign = 1 << (fraction + exponent)
    return edges + [e | sign for e in edges] + [s | chance.choice((0, sign)) for s in some]


def triples(kind: str, addend: str) -> list[tuple[int, int, int]]:
    """Random ones, and sums near a tie, which rounding twice gets wrong."""
    chance = random.Random(1)
    some = [
        (chance.choice(floats(kind)), chance.choice(floats(kind)), chance.choice(floats(addend))) for _ in range(1500)
    ]
    fraction, exponent = exact.FORMATS[kind]
    one = ((1 << (exponent - 1)) - 1) << fraction
    near = []
    for _ in range(500):
        x, y = (one | chance.randrange(1 << fraction) for _ in range(2))
        # An addend about half a unit of the product away, or so small that it only breaks a tie.
        z = exact.FORMATS[addend][0]
        unit = ((1 << (exact.FORMATS[addend][1] - 1)) - 1 - chance.choice((fraction + 1, 2 * fraction + 2, 60))) << z
        near.append((x, y, max(unit, 1) | chance.choice((0, 1 << (BITS[addend] - 1)))))
    return some + near


def packed_triples(kind: str, count: int = 1024) -> tuple[list, list, list[list[int]]]:
    """Low halves, high halves, and the three columns of both in one register."""
    cases = triples(kind, kind)[:count]
    low, high = cases[0::2], cases[1::2]
    columns = [
        [a | b << BITS[kind] for a, b in zip(lo, hi, strict=True)]
        for lo, hi in zip(zip(*low, strict=True), zip(*high, strict=True), strict=True)
    ]
    return low, high, columns


def near_ties(kind: str) -> list[int]:
    """float32 bits halfway between two numbers of a narrower format, and their neighbours."""
    chance = random.Random(3)
    fraction = 23 - exact.FORMATS[kind][0]
    return [
        0x3F800000 + (chance.randrange(1 << 10) << fraction) + (1 << (fraction - 1)) + d
        for _ in range(100)
        for d in (-1, 0, 1)
    ]


def is_nan(bits: int, kind: str) -> bool:
    value = exact.value(bits, kind)
    return value != value


def apply(form: str, columns: Sequence[Column], result_bits: int) -> list[int]:
    """The instruction on many inputs, one for each thread."""
    count = len(columns[0][1])
    threads = -(-count // 32) * 32
    names = [f"{REGISTER[bits]}{i + 10}" for i, (bits, _) in enumerate(columns)]
    registers = {
        name: np.resize(np.array(values, np.uint64), threads) for name, (_, values) in zip(names, columns, strict=True)
    }
    result = f"{REGISTER[result_bits]}1"
    out = snippet.run(f"{form} {result}, {', '.join(names)};", registers, threads=threads)
    return [int(x) for x in out[result][:count]]
