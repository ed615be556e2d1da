"""Shuffles, reductions and matrix products of a warp. Sections are those of PTX ISA 9.0."""

import itertools

import numpy as np
import pytest

from ptx_check import snippet
from ptx_check.bits import round_to_bfloat16, widen_bfloat16
from ptx_check.errors import Misuse, Stuck, Uninitialised, UnknownInstruction

VALUES = (np.arange(64, dtype=np.uint32) * 2654435761) & 0xFFFFFFFF


def shuffled(mode: str, lane: int, b: int, c: int) -> int:
    """9.7.9.6 shfl: the pseudocode of the ISA, for one lane; which lane it reads."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    highest, lowest = (lane & segment) | (clamp & ~segment & 31), lane & segment
    if mode == "up":
        source = lane - b
        return source if source >= highest else lane
    source = {"down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment & 31)}[mode]
    return source if source <= highest else lane


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    for b, c in itertools.product((0, 1, 2, 3, 8, 16, 31, 33), (0x1F, 0, 0x181F, 0x1C1F, 0x1000, 0x0707)):
        out = snippet.run(f"shfl.sync.{mode}.b32 %r1, %r2, {b}, {c}, -1;", {"%r2": VALUES}, threads=64)
        want = [int(VALUES[w * 32 + shuffled(mode, lane, b, c)]) for w in range(2) for lane in range(32)]
        assert out["%r1"].tolist() == want, (b, c)


def test_a_shuffle_carries_undefined_lanes():
    body = "setp.lt.u32 %p1, %r3, 4; @%p1 mov.b32 %r2, 1; shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;"
    out = snippet.run(body, {"%r3": np.arange(32)})
    assert out.undefined("%r1").tolist() == [not 16 <= i < 20 for i in range(32)]


def test_a_warp_instruction_needs_the_lanes_that_it_names():
    with pytest.raises(Misuse, match="member mask"):
        snippet.run("setp.lt.u32 %p1, %r2, 16; @%p1 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", {"%r2": np.arange(32)})
    with pytest.raises(Misuse, match="not in its member mask"):
        snippet.run("redux.sync.add.s32 %r1, %r2, 65535;", {"%r2": 1})
    with pytest.raises(Stuck):
        snippet.run(
            "setp.lt.u32 %p1, %r2, 16; @%p1 bra $A; redux.sync.add.s32 %r1, %r2, -1; ret;"
            "$A: redux.sync.add.s32 %r1, %r2, -1;",
            {"%r2": np.arange(32)},
        )


@pytest.mark.parametrize(
    ("form", "function"),
    [("add.s32", lambda v: sum(v) % 2**32), ("add.u32", lambda v: sum(v) % 2**32), ("max.u32", max), ("min.u32", min),
     ("max.s32", lambda v: max(v, key=lambda x: x ^ 1 << 31)), ("min.s32", lambda v: min(v, key=lambda x: x ^ 1 << 31)),
     ("and.b32", lambda v: np.bitwise_and.reduce(v)), ("or.b32", lambda v: np.bitwise_or.reduce(v)),
     ("xor.b32", lambda v: np.bitwise_xor.reduce(v))],
)  # fmt: skip
def test_reductions(form, function):
    """9.7.13.7 redux.sync."""
    out = snippet.run(f"redux.sync.{form} %r1, %r2, -1;", {"%r2": VALUES}, threads=64)
    for warp in range(2):
        values = [int(v) for v in VALUES[32 * warp : 32 * warp + 32]]
        assert out["%r1"][32 * warp : 32 * warp + 32].tolist() == [int(function(values))] * 32


@pytest.mark.parametrize("name", ["min", "max"])
def test_reductions_of_floats_skip_nan_unless_told(name):
    values = np.linspace(-3, 3, 32).astype(np.float32)
    values[7] = np.nan
    best = np.nanmin(values) if name == "min" else np.nanmax(values)
    out = snippet.run(f"redux.sync.{name}.f32 %r1, %r2, -1; redux.sync.{name}.NaN.f32 %r3, %r2, -1;", {"%r2": values})
    assert (out.floats("%r1") == best).all()
    assert (out["%r3"] == 0x7FFFFFFF).all()


def test_one_lane_is_elected():
    """9.7.13.15.19 elect.sync."""
    out = snippet.run("elect.sync %r1|%p1, -1;", threads=64)
    assert out["%p1"].reshape(2, 32).sum(1).tolist() == [1, 1]
    leader = out["%p1"].reshape(2, 32).argmax(1)
    assert out["%r1"].reshape(2, 32).tolist() == [[int(leader[w])] * 32 for w in range(2)]


# 9.7.14.5.8: the figures of mma.m16n8k16, as formulas of the ISA: (row, column) of element i of a lane.
def place_a(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_b(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def place_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def halves_of(x: np.ndarray, kind: str) -> np.ndarray:
    return round_to_bfloat16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def registers_of(x: np.ndarray, place, count: int, kind: str) -> list[np.ndarray]:
    """Packed registers of every lane, from a matrix."""
    elements = np.array([[x[place(lane, i)] for i in range(2 * count)] for lane in range(32)], np.float32)
    bits = halves_of(elements, kind).astype(np.uint32)
    return [bits[:, 2 * i] | bits[:, 2 * i + 1] << 16 for i in range(count)]


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> np.ndarray:
    registers = {f"%r{10 + i}": v for i, v in enumerate(registers_of(a, place_a, 4, kind))}
    registers |= {f"%r{20 + i}": v for i, v in enumerate(registers_of(b, place_b, 2, kind))}
    registers |= {f"%r{30 + i}": np.array([c[place_c(lane, i)] for lane in range(32)], np.float32) for i in range(4)}
    body = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r1,%r2,%r3,%r4}}, {{%r10,%r11,%r12,%r13}}, "
        "{%r20,%r21}, {%r30,%r31,%r32,%r33};"
    )
    out = snippet.run(body, registers)
    d = np.full((16, 8), np.nan, np.float32)
    for lane in range(32):
        for i in range(4):
            d[place_c(lane, i)] = out.floats(f"%r{i + 1}")[lane]
    return d


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_matrix_product_of_one_hot_inputs(kind):
    """9.7.14.5.14 mma: each element of A and of B alone, so that a wrong place is seen."""
    c = np.arange(128, dtype=np.float32).reshape(16, 8)
    other = np.arange(1, 129, dtype=np.float32).reshape(16, 8) % 13 + 1
    for row, column in itertools.product((0, 1, 7, 8, 15), range(16)):
        a = np.zeros((16, 16), np.float32)
        a[row, column] = 2
        assert (multiply(a, other, c, kind) == a @ other + c).all()
    random = np.random.default_rng(0).integers(-4, 5, (16, 16)).astype(np.float32)
    assert (multiply(random, other, c, kind) == random @ other + c).all()


def test_a_matrix_product_rounds_to_float32():
    a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    a[0, 0], b[0, 0] = 1, 1
    c = np.full((16, 8), 2.0**24, np.float32)
    assert multiply(a, b, c, "bf16")[0, 0] == 2.0**24  # a tie: to even


def test_a_matrix_product_of_undefined_registers():
    with pytest.raises(Uninitialised, match="matrix product"):
        snippet.run(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, "
            "{%r1,%r2,%r3,%r4};"
        )


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_shared_memory_and_back(count, trans):
    """9.7.14.5.15 ldmatrix, 9.7.14.5.16 stmatrix: lane l holds elements 2 * (l % 4) and + 1 of row l / 4."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8) + 100
    lines = matrices.reshape(-1, 8)[::-1]  # rows in any order: every row has an address of its own
    address = (8 * count - 1 - np.arange(32)) % (8 * count) * 16
    names = [f"%r{i + 1}" for i in range(count)]
    suffix = f"m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    body = (
        f"ldmatrix.sync.aligned.{suffix} {{{', '.join(names)}}}, [%r10]; bar.sync 0;"
        f"stmatrix.sync.aligned.{suffix} [%r11], {{{', '.join(names)}}};"
    )
    shared = np.concatenate([lines, np.zeros_like(lines)])
    out = snippet.run(body, {"%r10": address, "%r11": address + 16 * 8 * count}, shared=np.ascontiguousarray(shared))
    for i, name in enumerate(names):
        m = matrices[i].T if trans else matrices[i]
        want = [int(m[lane // 4, lane % 4 * 2]) | int(m[lane // 4, lane % 4 * 2 + 1]) << 16 for lane in range(32)]
        assert out[name].tolist() == want
    assert (out.block.shared.data.view(np.uint16).reshape(2, -1)[1] == lines.reshape(-1)).all()


def test_bfloat16_widens_exactly():
    assert (widen_bfloat16(np.array([0x3F80, 0xC000], np.uint16)) == [1, -2]).all()


def test_how_many_registers_a_thread_has_changes_nothing():
    """9.7.19.5 setmaxnreg: whole warps, and a number that there is."""
    snippet.run("setmaxnreg.dec.sync.aligned.u32 24; setmaxnreg.inc.sync.aligned.u32 240;", threads=128)
    with pytest.raises(Misuse, match="some lanes"):
        snippet.run("setp.lt.u32 %p1, %r2, 16; @%p1 setmaxnreg.dec.sync.aligned.u32 24;", {"%r2": np.arange(32)})
    for number in (16, 28, 264):
        with pytest.raises(UnknownInstruction, match="setmaxnreg"):
            snippet.run(f"setmaxnreg.dec.sync.aligned.u32 {number};")
