"""Integer, logic and comparison instructions against Python's integers. Sections are those of PTX ISA 9.0."""

import itertools
import operator

import pytest

from ptx_check import snippet
from ptx_check.errors import UnknownInstruction
from ptx_check.samples import EDGES, PAIRS, apply, number, signed


def truncated_division(x: int, y: int) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


BINARY = {  # 9.7.1.1 add to 9.7.1.11 max
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
}
FORMS = [f"{name}.{kind}" for name in BINARY for kind in ("s32", "u32", "s64", "u64", "u16", "s16")]


@pytest.mark.parametrize("form", FORMS)
def test_arithmetic_wraps(form):
    *name, kind = form.split(".")
    bits, function = int(kind[1:]), BINARY[".".join(name)]
    x, y = map(list, zip(*PAIRS[bits], strict=True))
    want = [function(number(a, kind), number(b, kind)) % (1 << bits) for a, b in PAIRS[bits]]
    assert apply(form, [(bits, x), (bits, y)], bits) == want


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division_and_remainder_go_towards_zero(kind):
    """9.7.1.7 div, 9.7.1.8 rem; the ISA leaves division by zero open."""
    bits = int(kind[1:])
    pairs = [(x, y) for x, y in PAIRS[bits] if y and (number(x, kind), number(y, kind)) != (-(1 << bits - 1), -1)]
    x, y = map(list, zip(*pairs, strict=True))
    quotients = [truncated_division(number(a, kind), number(b, kind)) for a, b in pairs]
    assert apply(f"div.{kind}", [(bits, x), (bits, y)], bits) == [q % (1 << bits) for q in quotients]
    rest = [(number(a, kind) - q * number(b, kind)) % (1 << bits) for q, (a, b) in zip(quotients, pairs, strict=True)]
    assert apply(f"rem.{kind}", [(bits, x), (bits, y)], bits) == rest


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_and_high_products(kind):
    """9.7.1.3 mul, 9.7.1.4 mad."""
    x, y = map(list, zip(*PAIRS[32], strict=True))
    products = [number(a, kind) * number(b, kind) for a, b in PAIRS[32]]
    assert apply(f"mul.wide.{kind}", [(32, x), (32, y)], 64) == [p % 2**64 for p in products]
    assert apply(f"mul.hi.{kind}", [(32, x), (32, y)], 32) == [(p >> 32) % 2**32 for p in products]
    addend = [(a * 0x123456789 + b) % 2**64 for a, b in PAIRS[32]]
    sums = [(p + z) % 2**64 for p, z in zip(products, addend, strict=True)]
    assert apply(f"mad.wide.{kind}", [(32, x), (32, y), (64, addend)], 64) == sums


@pytest.mark.parametrize("kind", ["s16", "u16"])
def test_products_of_16_bits(kind):
    x, y = map(list, zip(*PAIRS[16], strict=True))
    products = [number(a, kind) * number(b, kind) for a, b in PAIRS[16]]
    assert apply(f"mul.wide.{kind}", [(16, x), (16, y)], 32) == [p % 2**32 for p in products]
    assert apply(f"mul.hi.{kind}", [(16, x), (16, y)], 16) == [(p >> 16) % 2**16 for p in products]


@pytest.mark.parametrize("kind", ["s32", "s64"])
def test_multiply_and_add_keeps_the_low_half(kind):
    bits = int(kind[1:])
    x, y = map(list, zip(*PAIRS[bits], strict=True))
    want = [(a * b + a) % (1 << bits) for a, b in PAIRS[bits]]
    assert apply(f"mad.lo.{kind}", [(bits, x), (bits, y), (bits, x)], bits) == want


@pytest.mark.parametrize("bits", [32, 64])
def test_negation_and_size(bits):
    """9.7.1.12 neg, 9.7.1.9 abs: the most negative number stays."""
    x = list(EDGES[bits])
    assert apply(f"neg.s{bits}", [(bits, x)], bits) == [-a % (1 << bits) for a in x]
    assert apply(f"abs.s{bits}", [(bits, x)], bits) == [abs(signed(a, bits)) % (1 << bits) for a in x]


@pytest.mark.parametrize("name", ["min", "max"])
def test_relu_clamps_at_zero(name):
    """9.7.1.10 min.relu, max.relu."""
    x, y = map(list, zip(*PAIRS[32], strict=True))
    want = [max(0, BINARY[name](signed(a, 32), signed(b, 32))) for a, b in PAIRS[32]]
    assert apply(f"{name}.relu.s32", [(32, x), (32, y)], 32) == want


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic(name, bits):
    """9.7.8.1 and to 9.7.8.3 xor."""
    x, y = map(list, zip(*PAIRS[bits], strict=True))
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[name]
    assert apply(f"{name}.b{bits}", [(bits, x), (bits, y)], bits) == [function(a, b) for a, b in PAIRS[bits]]


def test_logic_of_predicates():
    pairs = list(itertools.product((0, 1), (0, 1)))
    x, y = map(list, zip(*pairs, strict=True))
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        assert apply(f"{name}.pred", [(1, x), (1, y)], 1) == [function(a, b) for a, b in pairs]
    assert apply("not.pred", [(1, x)], 1) == [1 - a for a in x]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_not(bits):
    """9.7.8.4 not."""
    x = list(EDGES[bits])
    assert apply(f"not.b{bits}", [(bits, x)], bits) == [a ^ ((1 << bits) - 1) for a in x]


@pytest.mark.parametrize("kind", ["b32", "b64", "b16", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_beyond_the_width_are_clamped(kind):
    """9.7.8.6 shl, 9.7.8.7 shr."""
    bits = int(kind[1:])
    pairs = list(itertools.product(EDGES[bits], (0, 1, bits - 1, bits, bits + 1, 200, 2**32 - 1)))
    x, by = map(list, zip(*pairs, strict=True))
    if kind[0] == "b":
        want = [(a << b) % (1 << bits) if b < bits else 0 for a, b in pairs]
        assert apply(f"shl.{kind}", [(bits, x), (32, by)], bits) == want
        assert apply(f"shr.{kind}", [(bits, x), (32, by)], bits) == [a >> min(b, bits) for a, b in pairs]
    else:
        want = [(number(a, kind) >> min(b, 300)) % (1 << bits) for a, b in pairs]
        assert apply(f"shr.{kind}", [(bits, x), (32, by)], bits) == want


@pytest.mark.parametrize("bits", [32, 64])
def test_population_count(bits):
    """9.7.1.15 popc."""
    values = list(EDGES[bits])
    assert apply(f"popc.b{bits}", [(bits, values)], 32) == [x.bit_count() for x in values]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bit_field_as_the_isa_writes_it(kind):
    """9.7.1.18 bfe: the ISA's own loop over bits."""
    cases = list(itertools.product(EDGES[32], (0, 1, 5, 24, 31, 32, 40, 255, 256), (0, 1, 3, 8, 31, 32, 33, 255, 257)))

    def extract(a: int, position: int, length: int) -> int:
        position, length, top = position & 255, length & 255, 31
        plain = kind == "u32" or length == 0
        sign = 0 if plain else a >> min(position + length - 1, top) & 1
        result = 0
        for i in range(32):
            bit = a >> (position + i) & 1 if i < length and position + i <= top else sign
            result |= bit << i
        return result

    a, position, length = map(list, zip(*cases, strict=True))
    assert apply(f"bfe.{kind}", [(32, a), (32, position), (32, length)], 32) == [extract(*case) for case in cases]


def test_permute_picks_bytes_or_their_signs():
    """9.7.8.8 prmt."""
    cases = [(0x80112233, 0x445566F7, s) for s in (0x3210, 0x7654, 0x0000, 0xFEDC, 0xBA98, 0x73C4, 0x1F8F)]

    def permute(a: int, b: int, selector: int) -> int:
        both, result = a | b << 32, 0
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = both >> 8 * (pick & 7) & 255
            result |= ((255 if byte & 128 else 0) if pick & 8 else byte) << 8 * i
        return result

    a, b, selector = map(list, zip(*cases, strict=True))
    assert apply("prmt.b32", [(32, a), (32, b), (32, selector)], 32) == [permute(*case) for case in cases]


COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64", "b16", "b32", "b64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name, kind):
    """9.7.6.2 setp; bits are only equal or not."""
    if kind[0] == "b" and name not in ("eq", "ne"):
        name = "eq"
    bits = int(kind[1:])
    x, y = map(list, zip(*PAIRS[bits], strict=True))
    want = [COMPARISONS[name](number(a, kind), number(b, kind)) for a, b in PAIRS[bits]]
    assert apply(f"setp.{name}.{kind}", [(bits, x), (bits, y)], 1) == want


def test_comparison_joined_with_a_predicate():
    x, y, p = [1, 1, 2, 2], [1, 2, 1, 2], [0, 1, 1, 0]
    equal = [1, 0, 0, 1]
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        want = [function(a, b) for a, b in zip(equal, p, strict=True)]
        assert apply(f"setp.eq.{name}.s32", [(32, x), (32, y), (1, p)], 1) == want


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32"])
def test_selection(kind):
    """9.7.6.3 selp."""
    bits = int(kind[1:])
    x, y = list(EDGES[bits]), list(reversed(EDGES[bits]))
    p = [i % 3 == 0 for i in range(len(x))]
    want = [a if c else b for a, b, c in zip(x, y, p, strict=True)]
    assert apply(f"selp.{kind}", [(bits, x), (bits, y), (1, [int(c) for c in p])], bits) == want


INTEGER_CONVERSIONS = (
    "s64.s32",
    "u64.u32",
    "u32.u64",
    "u32.u16",
    "s32.s16",
    "u16.u32",
    "s32.s64",
    "s64.s16",
    "u64.u16",
)


@pytest.mark.parametrize("form", INTEGER_CONVERSIONS)
def test_integer_conversion_extends_or_truncates(form):
    """9.7.9.21 cvt."""
    result, kind = form.split(".")
    x = list(EDGES[int(kind[1:])])
    want = [number(a, kind) % (1 << int(result[1:])) for a in x]
    assert apply(f"cvt.{form}", [(int(kind[1:]), x)], int(result[1:])) == want


@pytest.mark.parametrize("kind", ["b16", "u16", "b32", "u32", "b64", "u64"])
def test_moves_copy(kind):
    """9.7.9.4 mov."""
    bits = int(kind[1:])
    assert apply(f"mov.{kind}", [(bits, EDGES[bits])], bits) == list(EDGES[bits])


def test_moves_pack_and_unpack():
    """9.7.9.4 mov: the first element is the lowest."""
    out = snippet.run(
        "mov.b64 %rd1, {%r1, %r2}; mov.b64 {%r3, _}, %rd1; mov.b64 {_, %r4}, %rd1; mov.b32 {%rs1, %rs2}, %r1;"
        "mov.b32 %r5, {%rs2, %rs1}; mov.b32 %r6, -1; mov.pred %p1, -1; mov.pred %p2, 0; mov.b32 %r7, 0f3F800000;",
        {"%r1": 0x11112222, "%r2": 0x33334444},
    )
    assert int(out["%rd1"][0]) == 0x3333444411112222
    assert (int(out["%r3"][0]), int(out["%r4"][0])) == (0x11112222, 0x33334444)
    assert (int(out["%rs1"][0]), int(out["%rs2"][0]), int(out["%r5"][0])) == (0x2222, 0x1111, 0x22221111)
    assert int(out["%r6"][0]) == 0xFFFFFFFF
    assert out["%p1"].all()
    assert not out["%p2"].any()
    assert out.floats("%r7")[0] == 1


def test_special_registers():
    """10.1 to 10.25: %tid, %ntid, %laneid, %ctaid, %nctaid."""
    out = snippet.run(
        "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.z; mov.u32 %r4, %laneid;"
        "mov.u32 %r5, %ntid.x;",
        threads=64,
        position=(3, 2, 1),
    )
    assert out["%r1"].tolist() == list(range(64))
    assert out["%r4"].tolist() == [*range(32), *range(32)]
    assert [int(out[f"%r{i}"][0]) for i in (2, 3, 5)] == [2, 2, 64]


def test_addresses_of_parameters():
    """9.7.9.20 cvta; 9.7.9.8 ld.param, which extends by its type."""
    parameters = bytes([0xFE, 0xFF, 0xFF, 0xFF]) + bytes(188)
    out = snippet.run(
        "mov.b64 %rd1, second; cvta.param.u64 %rd2, %rd1; ld.param.s32 %rd3, [first]; ld.param.b32 %r1, [first];"
        "ld.param.b64 %rd4, [first];",
        parameters=parameters,
    )
    assert int(out["%rd2"][0]) == 64
    assert int(out["%rd3"][0]) == 2**64 - 2
    assert int(out["%r1"][0]) == int(out["%rd4"][0]) == 2**32 - 2


@pytest.mark.parametrize(
    "text",
    ["add.sat.s32 %r1, %r2, %r3;", "mul.lo.f32 %r1, %r2, %r3;", "frobnicate.b32 %r1, %r2;",
     "mul24.lo.s32 %r1, %r2, %r3;",
     "setp.lt.b33 %p1, %r2, %r3;", "cvt.rz.f16.f32 %rs1, %r2;", "add.s32 %r1, %r2;", "add.s32 %q1, %r2, %r3;",
     "bar.arrive 0, 32;", "@%p1 bar.sync 0;", "ld.volatile.global.b32 %r1, [%rd1];"],
)  # fmt: skip
def test_what_the_table_does_not_know_is_named(text):
    with pytest.raises(UnknownInstruction) as raised:
        snippet.run(text)
    assert text.rstrip(";").split()[0] in str(raised.value)
