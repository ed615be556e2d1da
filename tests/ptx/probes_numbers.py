"""Probes of instructions that compute a number from numbers: integers, floating point, comparisons, conversions."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ptx_check.samples import BITS, EDGES, PAIRS, REGISTER, floats, is_nan, near_ties, number, packed_triples, triples
from tests.ptx.probes import Probe

FROM_90, FROM_100 = (90, 100), (100,)


def width(kind: str) -> int:
    """Bits of a PTX type in a register.

    >>> width("s32"), width("bf16x2"), width("pred")
    (32, 32, 1)
    """
    if kind == "pred":
        return 1
    element, _, pair = kind.partition("x")
    return int("".join(c for c in element if c.isdigit())) * int(pair or 1)


def of(
    form: str, result: int, columns: Sequence[tuple[int, Sequence[int]]], targets: Sequence[int] = (80, 90, 100), ulps=0
) -> Probe:
    """``form``, with columns of (bits, values) as its sources and a result of so many bits."""
    inputs = {
        f"{REGISTER[bits]}{10 + i}": np.array([int(v) for v in values], np.uint64).astype(f"u{max(bits, 16) // 8}")
        for i, (bits, values) in enumerate(columns)
    }
    target = f"{REGISTER[result]}1"
    return Probe(form, f"{form} {target}, {', '.join(inputs)};", inputs, (target,), targets, ulps)


def columns_of(cases: Sequence[Sequence[int]], *bits: int) -> list[tuple[int, list[int]]]:
    return [(n, list(values)) for n, values in zip(bits, zip(*cases, strict=True), strict=True)]


BINARY = (
    "add.s16 add.s32 add.s64 sub.s16 sub.s32 sub.s64 mul.lo.s16 mul.lo.s32 mul.lo.s64 mul.hi.u16 mul.hi.s32 mul.hi.u32 "
    "min.s32 min.s64 min.u32 min.u64 max.s32 max.s64 max.u32 max.u64 and.b16 and.b32 and.b64 or.b16 or.b32 or.b64 "
    "xor.b16 xor.b32 xor.b64"
)
COMPARISONS = "eq.b16 ne.b16 eq.b32 ne.b32 eq.b64 ne.b64", "lt le gt ge", "s16 s32 s64 u16 u32 u64"


def integer_probes() -> Iterator[Probe]:
    for form in BINARY.split():
        bits = width(form.split(".")[-1])
        yield of(form, bits, columns_of(PAIRS[bits], bits, bits))
    for name in ("min.relu.s32", "max.relu.s32"):
        yield of(name, 32, columns_of(PAIRS[32], 32, 32), FROM_90)
    for kind in ("s16", "u16", "s32", "u32"):
        bits = width(kind)
        yield of(f"mul.wide.{kind}", 2 * bits, columns_of(PAIRS[bits], bits, bits))
    for kind in ("s32", "s64"):
        yield of(f"mad.lo.{kind}", width(kind), _with_addend(width(kind), width(kind)))
    for kind in ("s32", "u32"):
        yield of(f"mad.wide.{kind}", 64, _with_addend(32, 64))
    for kind in ("s32", "u32", "s64", "u64"):
        bits = width(kind)
        pairs = [(x, y) for x, y in PAIRS[bits] if y and (number(x, kind), number(y, kind)) != (-(1 << bits - 1), -1)]
        for name in ("div", "rem"):
            yield of(f"{name}.{kind}", bits, columns_of(pairs, bits, bits))
    for form in ("neg.s32", "neg.s64", "abs.s32", "abs.s64", "not.b16", "not.b32", "not.b64"):
        bits = width(form.split(".")[-1])
        yield of(form, bits, [(bits, EDGES[bits])])
    for bits in (32, 64):
        yield of(f"popc.b{bits}", 32, [(bits, EDGES[bits])])


def _with_addend(bits: int, wide: int) -> list[tuple[int, list[int]]]:
    cases = [(x, y, (x * 0x123456789 + y) % (1 << wide)) for x, y in PAIRS[bits]]
    return columns_of(cases, bits, bits, wide)


def bit_probes() -> Iterator[Probe]:
    for form in ("shl.b16", "shl.b32", "shl.b64", "shr.b32", *(f"shr.{k}{b}" for k in "us" for b in (16, 32, 64))):
        bits = width(form.split(".")[-1])
        by = (0, 1, bits - 1, bits, bits + 1, 200, 2**32 - 1)
        yield of(form, bits, columns_of(list(itertools.product(EDGES[bits], by)), bits, 32))
    fields = list(itertools.product(EDGES[32], (0, 1, 5, 24, 31, 32, 40, 255, 256), (0, 1, 3, 8, 31, 32, 33, 255, 257)))
    for kind in ("u32", "s32"):
        yield of(f"bfe.{kind}", 32, columns_of(fields, 32, 32, 32))
    picks = itertools.product((0x80112233, 0xFF0000FF), (0x445566F7,), (0x3210, 0x7654, 0, 0xFEDC, 0xBA98, 0x73C4))
    yield of("prmt.b32", 32, columns_of(list(picks), 32, 32, 32))
    for name in ("and", "or", "xor"):
        yield of(f"{name}.pred", 1, columns_of(list(itertools.product((0, 1), (0, 1))), 1, 1))
    yield of("not.pred", 1, [(1, (0, 1))])
    yield of("mov.pred", 1, [(1, (0, 1))])
    for kind in ("b16", "b32", "b64", "f32"):
        bits = width(kind)
        cases = [(x, y, p) for x, y in PAIRS[bits] for p in (0, 1)]
        yield of(f"selp.{kind}", bits, columns_of(cases, bits, bits, 1))
    for kind in ("b16", "u16", "b32", "u32", "b64", "u64"):
        yield of(f"mov.{kind}", width(kind), [(width(kind), EDGES[width(kind)])])
    for form in ("s64.s32", "u64.u32", "u32.u64", "u32.u16", "s32.s16", "u16.u32", "s32.s64", "s64.s16", "u64.u16"):
        result, kind = form.split(".")
        yield of(f"cvt.{form}", width(result), [(width(kind), EDGES[width(kind)])])


def comparison_probes() -> Iterator[Probe]:
    some, names, kinds = (words.split() for words in COMPARISONS)
    for form in (*some, *(f"{name}.{kind}" for kind in kinds for name in names)):
        bits = width(form.split(".")[-1])
        yield of(f"setp.{form}", 1, columns_of(PAIRS[bits], bits, bits))
    pairs = list(itertools.product(floats("f32", 8), floats("f32", 8)))
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"):
        yield of(f"setp.{name}.f32", 1, columns_of(pairs, 32, 32))


def float_probes() -> Iterator[Probe]:
    """Bit for bit: one rounding, to nearest even, and the canonical NaN."""
    for kind, rounding in (
        ("f32", ""), ("f32", ".rn"), ("f32", ".ftz"), ("f16", ""), ("f16", ".rn"), ("bf16", ""), ("bf16", ".rn"),
    ):  # fmt: skip
        pairs = list(itertools.product(floats(kind), floats(kind)))
        targets = FROM_90 if kind == "bf16" else (80, 90, 100)
        for name in ("add", "sub", "mul"):
            yield of(f"{name}{rounding}.{kind}", BITS[kind], columns_of(pairs, BITS[kind], BITS[kind]), targets)
    for kind in ("f32", "f16", "bf16"):
        pairs = list(itertools.product(floats(kind), floats(kind)))
        for name in ("min", "max", "min.NaN", "max.NaN"):
            yield of(f"{name}.{kind}", BITS[kind], columns_of(pairs, BITS[kind], BITS[kind]))
    for form, kind, addend, targets in (
        ("fma.rn.f32", "f32", "f32", (80, 90, 100)), ("fma.rn.ftz.f32", "f32", "f32", (80, 90, 100)),
        ("fma.rn.f16", "f16", "f16", (80, 90, 100)), ("fma.rn.bf16", "bf16", "bf16", (80, 90, 100)),
        ("fma.rn.f32.f16", "f16", "f32", FROM_100), ("fma.rn.f32.bf16", "bf16", "f32", FROM_100),
    ):  # fmt: skip
        cases = triples(kind, addend)
        yield of(form, BITS[addend], columns_of(cases, BITS[kind], BITS[kind], BITS[addend]), targets)
    for kind in ("f16", "bf16"):
        pairs = list(itertools.product(floats(kind), floats("f32")))
        for name in ("add", "sub"):
            yield of(f"{name}.rn.f32.{kind}", 32, columns_of(pairs, 16, 32), FROM_100)
    numbers = [x for x in floats("f32") if not is_nan(x, "f32")]  # of NaN, the ISA leaves the bits open
    for name in ("neg", "abs"):
        yield of(f"{name}.f32", 32, [(32, numbers)])
    for kind, forms, targets in (
        ("f16", ("add", "sub", "mul", "add.rn", "sub.rn", "mul.rn", "fma.rn"), (80, 90, 100)),
        ("bf16", ("add", "sub", "mul", "add.rn", "sub.rn", "mul.rn"), FROM_90),
        ("bf16", ("fma.rn",), (80, 90, 100)),
        ("f32", ("add", "sub", "mul", "add.rn", "sub.rn", "mul.rn", "fma.rn"), FROM_100),
    ):
        *_, columns = packed_triples(kind)
        bits = 2 * BITS[kind]
        for form in forms:
            used = columns if form.startswith("fma") else columns[:2]
            yield of(f"{form}.{kind}x2", bits, [(bits, column) for column in used], targets)


def conversion_probes() -> Iterator[Probe]:
    for kind in ("f16", "bf16"):
        wide = floats("f32", 1000) + near_ties(kind)
        yield of(f"cvt.rn.{kind}.f32", 16, [(32, wide)])
        yield of(f"cvt.rn.{kind}x2.f32", 32, [(32, wide), (32, wide[::-1])])
        yield of(f"cvt.f32.{kind}", 32, [(16, [x for x in floats(kind, 500) if not is_nan(x, kind)])])
    whole = (0, 1, 2**24 + 1, 2**24 + 3, 2**31, 2**32 - 1, 2**31 - 1)
    for kind in ("s32", "u32"):
        yield of(f"cvt.rn.f32.{kind}", 32, [(32, whole)])
        for rounding in ("rzi", "rni", "rmi", "rpi"):
            yield of(f"cvt.{rounding}.{kind}.f32", 32, [(32, floats("f32", 200))])


def approximate_probes() -> Iterator[Probe]:
    """9.7.3: what the ISA promises of each, in units in the last place."""
    x = floats("f32", 1000)
    for form, ulps in (
        ("ex2.approx.f32", 2), ("ex2.approx.ftz.f32", 2), ("rcp.approx.ftz.f32", 1), ("rsqrt.approx.ftz.f32", 2),
        ("sqrt.approx.ftz.f32", 2),
    ):  # fmt: skip
        yield of(form, 32, [(32, x)], ulps=ulps)
    pairs = list(itertools.product(floats("f32"), floats("f32")))
    yield of("div.full.f32", 32, columns_of(pairs, 32, 32), ulps=2)
    inside = [(a, b) for a, b in pairs if b & 0x7F800000]  # of subnormal denominators the ISA promises nothing
    yield of("div.approx.f32", 32, columns_of(inside, 32, 32), ulps=2)
    # Its error is absolute, 2^-22, between a half and 2; elsewhere relative.
    apart = [a for a in x if not 0x3F000000 <= a <= 0x40000000]
    yield of("lg2.approx.f32", 32, [(32, apart)], ulps=4)


def number_probes() -> Iterator[Probe]:
    for made in (
        integer_probes, bit_probes, comparison_probes, float_probes, conversion_probes, approximate_probes,
    ):  # fmt: skip
        yield from made()
