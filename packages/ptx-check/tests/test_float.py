"""Floating-point instructions against rational numbers rounded once (`exact`). Sections are those of PTX ISA 9.0."""

import itertools
import math

import numpy as np
import pytest

from ptx_check import exact, snippet
from ptx_check.bits import round_to_bfloat16
from ptx_check.samples import BITS, REGISTER, apply, floats, is_nan, near_ties, packed_triples, triples


def subtract(x, y):
    return exact.add(x, -y if y != 0 or isinstance(y, float) else -0.0)


FUNCTIONS = {"add": exact.add, "sub": subtract, "mul": exact.multiply}


@pytest.mark.parametrize("rounding", ["", ".rn"])
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arithmetic_rounds_once_to_nearest_even(name, kind, rounding):
    """9.7.3.3 add, 9.7.3.4 sub, 9.7.3.5 mul, 9.7.4 for halves; NaN is canonical."""
    pairs = list(itertools.product(floats(kind), floats(kind)))
    x, y = map(list, zip(*pairs, strict=True))
    want = [exact.bits(FUNCTIONS[name](exact.value(a, kind), exact.value(b, kind)), kind) for a, b in pairs]
    assert apply(f"{name}{rounding}.{kind}", [(BITS[kind], x), (BITS[kind], y)], BITS[kind]) == want


@pytest.mark.parametrize(
    ("form", "kind", "addend"),
    [("fma.rn.f32", "f32", "f32"), ("fma.rn.bf16", "bf16", "bf16"), ("fma.rn.f16", "f16", "f16"),
     ("fma.rn.f32.bf16", "bf16", "f32"), ("fma.rn.f32.f16", "f16", "f32")],
)  # fmt: skip
def test_fused_multiply_and_add_rounds_once(form, kind, addend):
    """9.7.3.6 fma, 9.7.4.4 for halves, 9.7.5 for mixed precision."""
    cases = triples(kind, addend)
    x, y, z = map(list, zip(*cases, strict=True))
    want = [
        exact.bits(exact.fused(exact.value(a, kind), exact.value(b, kind), exact.value(c, addend)), addend)
        for a, b, c in cases
    ]
    assert apply(form, [(BITS[kind], x), (BITS[kind], y), (BITS[addend], z)], BITS[addend]) == want


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub"])
def test_a_half_and_a_single(name, kind):
    """9.7.5.1 add, 9.7.5.2 sub of mixed precision."""
    pairs = list(itertools.product(floats(kind), floats("f32")))
    x, y = map(list, zip(*pairs, strict=True))
    want = [exact.bits(FUNCTIONS[name](exact.value(a, kind), exact.value(b, "f32")), "f32") for a, b in pairs]
    assert apply(f"{name}.rn.f32.{kind}", [(16, x), (32, y)], 32) == want


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_packed_pairs_are_two_numbers(kind):
    """9.7.3.3 add.f32x2 and its kin, 9.7.4 for f16x2 and bf16x2: low half and high half apart."""
    bits, packed = BITS[kind], f"{kind}x2"
    low, high, joined = packed_triples(kind)

    def want(function, count: int) -> list[int]:
        one = [
            [exact.bits(function(*(exact.value(x, kind) for x in case[:count])), kind) for case in half]
            for half in (low, high)
        ]
        return [a | b << bits for a, b in zip(*one, strict=True)]

    columns = [(2 * bits, column) for column in joined]
    assert apply(f"fma.rn.{packed}", columns, 2 * bits) == want(exact.fused, 3)
    for name, function in FUNCTIONS.items():
        for rounding in ("", ".rn"):
            assert apply(f"{name}{rounding}.{packed}", columns[:2], 2 * bits) == want(function, 2)


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum(name, kind):
    """9.7.3.11 min, 9.7.3.12 max: -0 is below +0; a NaN gives the other operand, with .NaN a NaN."""

    def order(bits: int) -> tuple[float, int]:
        number = exact.value(bits, kind)
        return (float(number) if isinstance(number, float) else number), not exact.negative(number)

    def pick(a: int, b: int, keep: bool) -> int:
        x, y = (exact.value(v, kind) for v in (a, b))
        nans = [isinstance(v, float) and math.isnan(v) for v in (x, y)]
        if all(nans) or (keep and any(nans)):
            return exact.NAN[kind]
        if any(nans):
            return b if nans[0] else a
        return min(a, b, key=order) if name == "min" else max(a, b, key=order)

    pairs = list(itertools.product(floats(kind), floats(kind)))
    x, y = map(list, zip(*pairs, strict=True))
    columns = [(BITS[kind], x), (BITS[kind], y)]
    assert apply(f"{name}.{kind}", columns, BITS[kind]) == [pick(a, b, False) for a, b in pairs]
    assert apply(f"{name}.NaN.{kind}", columns, BITS[kind]) == [pick(a, b, True) for a, b in pairs]
    if kind == "f32":  # of three numbers (sm_100)
        third = y[5:] + y[:5]
        want = [pick(pick(a, b, False), c, False) for (a, b), c in zip(pairs, third, strict=True)]
        assert apply(f"{name}.f32", [*columns, (32, third)], 32) == want


def test_flushed_arithmetic():
    """9.7.3, .ftz: subnormal arguments and results become zeros of their sign."""

    def flushed_bits(bits: int) -> int:
        return bits & 1 << 31 if bits & 0x7F800000 == 0 else bits

    near = [0x00800000, 0x00800001, 0x80C00000, 0x00FFFFFF, 0x3F000000]  # whose sums and products are subnormal
    some = [*floats("f32", 8), *near]
    x, y = map(list, zip(*itertools.product(some, some), strict=True))
    z = x[7:] + x[:7]
    p, q, r = ([exact.value(flushed_bits(a), "f32") for a in side] for side in (x, y, z))
    for name, function in FUNCTIONS.items():
        want = [flushed_bits(exact.bits(function(a, b), "f32")) for a, b in zip(p, q, strict=True)]
        assert apply(f"{name}.ftz.f32", [(32, x), (32, y)], 32) == want
    want = [flushed_bits(exact.bits(exact.fused(*abc), "f32")) for abc in zip(p, q, r, strict=True)]
    assert apply("fma.rn.ftz.f32", [(32, x), (32, y), (32, z)], 32) == want


def test_sign_bits():
    """9.7.3.10 neg, 9.7.3.9 abs."""
    x = floats("f32")
    assert apply("neg.f32", [(32, x)], 32) == [a ^ 1 << 31 for a in x]
    assert apply("abs.f32", [(32, x)], 32) == [a & ~(1 << 31) for a in x]


def value_of(bits: int) -> float:
    number = exact.value(bits, "f32")
    return number if isinstance(number, float) else float(number)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def power(x: float) -> float:
    if math.isnan(x):
        return x
    return math.inf if x >= 128 else 0.0 if x < -200 else 2.0**x


def reciprocal_root(x: float) -> float:
    if math.isnan(x) or x < 0:
        return math.nan
    return math.copysign(math.inf, x) if x == 0 else 0.0 if math.isinf(x) else 1 / math.sqrt(x)


def close(got: list[int], want: list[float], ulps: int) -> None:
    """Within some units in the last place; zeros, infinities and NaN as they are."""
    for bits, number in zip(got, want, strict=True):
        target = exact.bits(number, "f32")
        if target in (0, 1 << 31) or math.isnan(number) or math.isinf(number):
            assert bits == target, (hex(bits), number)
        else:
            assert abs(bits - target) <= ulps, (hex(bits), hex(target), number)


@pytest.mark.parametrize("ftz", [True, False])
def test_powers_of_two(ftz):
    """9.7.3.19 ex2.approx: 2 ulp; .ftz flushes subnormal arguments and results."""
    x = [
        *floats("f32"),
        exact.bits(-126.5, "f32"),
        exact.bits(-149.0, "f32"),
        exact.bits(127.99, "f32"),
        exact.bits(128.0, "f32"),
    ]
    f = flushed if ftz else lambda y: y
    want = [f(power(f(value_of(a)))) for a in x]
    close(apply("ex2.approx.ftz.f32" if ftz else "ex2.approx.f32", [(32, x)], 32), want, 2)


def root(x: float) -> float:
    return math.nan if math.isnan(x) or x < 0 else math.sqrt(x)


def reciprocal(x: float) -> float:
    return math.copysign(math.inf, x) if x == 0 else 1 / x


def binary_logarithm(x: float) -> float:
    if math.isnan(x) or x < 0:
        return math.nan
    return -math.inf if x == 0 else math.log2(x)


@pytest.mark.parametrize(
    ("name", "function", "ulps"), [("rsqrt", reciprocal_root, 2), ("sqrt", root, 2), ("rcp", reciprocal, 1)]
)
def test_roots_and_reciprocals(name, function, ulps):
    """9.7.3.16 rsqrt.approx: 2^-22.9 relative error, 9.7.3.14 sqrt.approx: 2^-23, 9.7.3.13 rcp.approx: 1 ulp."""
    x = floats("f32", 500)
    want = [flushed(function(flushed(value_of(a)))) for a in x]
    close(apply(f"{name}.approx.ftz.f32", [(32, x)], 32), want, ulps)


def test_binary_logarithms():
    """9.7.3.18 lg2.approx: 2^-22, relative away from 1 and absolute between a half and 2."""
    x = [a for a in floats("f32", 500) if not 0x3F000000 <= a <= 0x40000000]
    close(apply("lg2.approx.f32", [(32, x)], 32), [binary_logarithm(value_of(a)) for a in x], 4)
    near = [0x3F000000 + i * 104729 for i in range(160)]
    for got, a in zip(apply("lg2.approx.f32", [(32, near)], 32), near, strict=True):
        assert abs(value_of(got) - math.log2(value_of(a))) <= 2**-22


@pytest.mark.parametrize("form", ["div.full.f32", "div.approx.f32", "div.rn.f32"])
def test_division(form):
    """9.7.3.8 div: div.full and div.approx within 2 ulp, the latter up to denominators of 2^126; div.rn rounded."""
    pairs = list(itertools.product(floats("f32"), floats("f32")))
    x, y = map(list, zip(*pairs, strict=True))

    def quotient(a: int, b: int) -> float:
        p, q = exact.value(a, "f32"), exact.value(b, "f32")
        sign = -1.0 if exact.negative(p) != exact.negative(q) else 1.0
        if form == "div.approx.f32" and not exact.is_special(q) and abs(q) > 2**126:
            q = math.inf if q > 0 else -math.inf  # the ISA: NaN if the numerator is infinite, else 0
        if exact.is_special(p, q) or q == 0:
            both = math.isnan(float(p)) or math.isnan(float(q)) or (p == 0 and q == 0)
            both = both or (math.isinf(float(p)) and math.isinf(float(q)))
            return math.nan if both else sign * (0.0 if math.isinf(float(q)) else math.inf)
        return sign * 0.0 if p == 0 else p / q

    close(apply(form, [(32, x), (32, y)], 32), [quotient(a, b) for a, b in pairs], 0 if form == "div.rn.f32" else 2)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversion_between_floats(kind):
    """9.7.9.21 cvt: to nearest even, NaN canonical; widening is exact."""
    wide = floats("f32", 1000) + near_ties(kind)
    want = [exact.bits(exact.value(a, "f32"), kind) for a in wide]
    assert apply(f"cvt.rn.{kind}.f32", [(32, wide)], 16) == want
    pairs = [hi << 16 | lo for hi, lo in zip(want, reversed(want), strict=True)]
    assert apply(f"cvt.rn.{kind}x2.f32", [(32, wide), (32, wide[::-1])], 32) == pairs
    halves = [a for a in floats(kind, 500) if not is_nan(a, kind)]  # of NaN the ISA does not say
    assert apply(f"cvt.f32.{kind}", [(16, halves)], 32) == [exact.bits(exact.value(a, kind), "f32") for a in halves]


def test_conversion_to_integers_clamps():
    """9.7.9.21 cvt: NaN gives 0; values beyond the range the nearest limit."""
    x = [
        exact.bits(v, "f32")
        for v in (0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, 1e20, math.inf, -math.inf, math.nan, 7.99, -7.99)
    ]
    rounding = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}
    for word, function in rounding.items():
        for kind, low, high in (("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)):
            want = []
            for v in map(value_of, x):
                whole = 0 if math.isnan(v) else low if v == -math.inf else high if v == math.inf else function(v)
                want.append(min(max(whole, low), high) % 2**32)
            assert apply(f"cvt.{word}.{kind}.f32", [(32, x)], 32) == want


def test_conversion_from_integers_rounds():
    x = [0, 1, 2**24 + 1, 2**24 + 3, 2**31, 2**32 - 1]
    assert apply("cvt.rn.f32.u32", [(32, x)], 32) == [exact.bits(exact.Fraction(a), "f32") for a in x]
    signed = [a - 2**32 if a >= 2**31 else a for a in x]
    assert apply("cvt.rn.f32.s32", [(32, x)], 32) == [exact.bits(exact.Fraction(a), "f32") for a in signed]


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_comparison_with_nan(kind):
    """9.7.6.2 setp: ordered comparisons with NaN are false, unordered ones true; zeros are equal."""
    pairs = list(itertools.product(floats(kind, 8), floats(kind, 8)))
    x, y = (np.array(side) for side in zip(*pairs, strict=True))
    threads = -(-len(pairs) // 32) * 32
    register = REGISTER[BITS[kind]]
    fill = lambda side: np.concatenate([side, np.repeat(side[:1], threads - len(side))])  # noqa: E731
    names = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    body = "".join(f"setp.{n}.{kind} %p{i}, {register}1, {register}2;" for i, n in enumerate(names))
    out = snippet.run(body, {f"{register}1": fill(x), f"{register}2": fill(y)}, threads=threads)
    for i, name in enumerate(names):
        for lane, (a, b) in enumerate(pairs):
            p, q = exact.value(a, kind), exact.value(b, kind)
            nan = any(isinstance(v, float) and math.isnan(v) for v in (p, q))
            plain = {"eq": p == q, "ne": p != q, "lt": p < q, "le": p <= q, "gt": p > q, "ge": p >= q}
            want = (
                nan == (name == "nan") if name in ("nan", "num") else (name.endswith("u") if nan else plain[name[:2]])
            )
            assert bool(out[f"%p{i}"][lane]) == want, (name, hex(a), hex(b))


def test_bfloat16_rounding_agrees_with_the_statement():
    """The helper that the rest of the suite uses for bfloat16."""
    x = floats("f32", 5000)
    got = round_to_bfloat16(np.array(x, np.uint32).view(np.float32))
    assert got.tolist() == [exact.bits(exact.value(a, "f32"), "bf16") for a in x]
