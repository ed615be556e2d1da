"""Products on tensor memory. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest
from test_warp import halves_of
from test_wgmma import store_tile

from ptx_check import snippet
from ptx_check.errors import Misuse, OutOfBounds, PtxError, Race, Stuck, Uninitialised
from ptx_check.ops_tcgen05 import TensorMemory

N = 32
A_AT, B_AT, BARRIER, SLOT = 0, 16384, 20480, 20488
SMEM = 2 << 61 | 1 << 46 | 64 << 32 | 1 << 16  # 9.7.16.4.1: swizzle 128, eight rows are 1024 bytes
HEAD = (
    f"mov.u32 %r30, %tid.x; setp.eq.u32 %p9, %r30, 0; setp.lt.u32 %p1, %r30, 32; mov.b32 %r20, {BARRIER};"
    f"mov.b32 %r40, {SLOT}; shr.u32 %r43, %r30, 5; shl.b32 %r43, %r43, 21;"
)
ALLOC = (
    "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 64; bar.sync 0; ld.shared.b32 %r41, [%r40];"
)
INIT = "@%p9 mbarrier.init.shared::cta.b64 [%r20], 1; bar.sync 0;"
PLACE = "add.s32 %r44, %r41, %r43;"  # of a warp: its 32 lanes are in bits 16 and up of an address
MMA = "@%p9 tcgen05.mma.cta_group::1.kind::f16 [%r41 + 0], {a}, %rd2, %r42, {keep};"
COMMIT = "@%p9 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20];"
WAIT = "$W: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r20], 0; @!%p8 bra $W;"
SECOND = "$V: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r20], 1; @!%p8 bra $V;"
RESULTS = ", ".join(f"%r{100 + i}" for i in range(N))
LOAD = f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {{{RESULTS}}}, [%r44 + 0]; tcgen05.wait::ld.sync.aligned;"
FREE = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r41, 64;"
# A as pairs in columns 32 to 39: 9.7.16.8.2 st, .32x32b: a lane of a warp is a row.
STORE_A = "tcgen05.st.sync.aligned.32x32b.x8.b32 [%r44 + 32], {%r50,%r51,%r52,%r53,%r54,%r55,%r56,%r57};"
STORED = "tcgen05.wait::st.sync.aligned; bar.sync 0;"


def descriptor(kind: str, transposed: bool, rows: int = 128) -> int:
    """9.7.16.4.2: the result is float32; formats, whether B is N-major, N / 8 and M / 16."""
    format_ = {"f16": 0, "bf16": 1}[kind]
    return 1 << 4 | format_ << 7 | format_ << 10 | transposed << 16 | N // 8 << 17 | rows // 16 << 24


def product(
    a: np.ndarray,
    b: np.ndarray,
    parts: list[str],
    *,
    kind: str = "bf16",
    transposed: bool = False,
    in_tensor_memory: bool = False,
    keep: bool = False,
    rows: int = 128,
    seed: int | None = None,
) -> snippet.Snippet:
    shared = np.zeros((SLOT + 8) // 2, np.uint16)
    store_tile(shared, A_AT, halves_of(a, kind))
    store_tile(shared, B_AT, halves_of(b if transposed else b.T, kind))
    pairs = halves_of(a, kind).view(np.uint32)
    registers = {
        "%rd1": SMEM | A_AT >> 4,
        "%rd2": SMEM | B_AT >> 4,
        "%r42": descriptor(kind, transposed, rows),
        "%p2": keep,
        **{f"%r{50 + i}": np.ascontiguousarray(pairs[:, i]) for i in range(8)},
    }
    left = "[%r41 + 32]" if in_tensor_memory else "%rd1"
    body = "".join(parts).replace("{a}", left).replace("{keep}", "%p2")
    return snippet.run(body, registers, threads=128, shared=shared, seed=seed)


def operands() -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    a, b = (chance.integers(-4, 5, shape).astype(np.float32) for shape in ((128, 16), (16, N)))
    return a, b


def result(out: snippet.Snippet) -> np.ndarray:
    return np.stack([out.floats(f"%r{100 + i}") for i in range(N)], 1)


def without(parts: list[str], text: str, instead: str = "") -> list[str]:
    return [part.replace(text, instead) for part in parts]


GOOD = [HEAD, ALLOC, PLACE, INIT, MMA, COMMIT, WAIT, LOAD, FREE]
FROM_TENSOR_MEMORY = [HEAD, ALLOC, PLACE, INIT, STORE_A, STORED, MMA, COMMIT, WAIT, LOAD, FREE]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("in_tensor_memory", [False, True])
def test_a_product(in_tensor_memory, transposed, kind):
    """9.7.16.10.9 tcgen05.mma: A from shared or from tensor memory, B K-major or N-major; one-hot and random."""
    a, b = operands()
    parts = FROM_TENSOR_MEMORY if in_tensor_memory else GOOD
    options = {"kind": kind, "transposed": transposed, "in_tensor_memory": in_tensor_memory}
    assert (result(product(a, b, parts, **options)) == a @ b).all()
    for row, column in ((0, 0), (33, 3), (127, 15), (65, 8)):
        one = np.zeros_like(a)
        one[row, column] = 2
        assert (result(product(one, b, parts, **options)) == one @ b).all()


def test_products_run_in_order_and_add():
    a, b = operands()
    again = MMA.replace("{keep}", "%p3")
    parts = ["mov.pred %p3, -1;", *GOOD[:5], again, again, *GOOD[5:]]
    assert (result(product(a, b, parts)) == 3 * (a @ b)).all()
    with pytest.raises(PtxError, match="nobody wrote"):
        product(a, b, GOOD, keep=True)


def test_a_product_of_64_rows():
    """9.7.16.10.5: row i is in lane i % 16 of quarter i / 16 of the lanes."""
    a, b = operands()
    names = [f"%r{200 + i}" for i in range(8)]
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x8.b32 {{{', '.join(names)}}}, [%r44 + 0], 16;"
    out = product(a, b, [*GOOD[:-2], load, FREE], rows=64)
    want = a[:64] @ b
    for lane in range(128):
        column = 16 if lane % 32 >= 16 else 0
        got = [out.floats(name)[lane] for name in names]
        assert got == want[lane // 32 * 16 + lane % 16, column : column + 8].tolist()


def test_half_rows():
    """9.7.16.8.1 ld, .16x32bx2: lanes 16 to 31 hold another part of the rows of lanes 0 to 15."""
    a, b = operands()
    names = [f"%r{200 + i}" for i in range(8)]
    halves = f"tcgen05.ld.sync.aligned.16x32bx2.x8.b32 {{{', '.join(names)}}}, [%r44 + 4], 16;"
    out = product(a, b, [*GOOD[:-1], halves, FREE])
    want = a @ b
    for lane in range(128):
        row, column = lane // 32 * 32 + lane % 16, 4 + (16 if lane % 32 >= 16 else 0)
        got = [out.floats(name)[lane] for name in names]
        assert got == want[row, column : column + 8].tolist()


SHAPES = [("32x32b", n) for n in (8, 32, 64, 128)] + [("16x32bx2", n) for n in (8, 16, 32, 64)]


@pytest.mark.parametrize(("shape", "count"), SHAPES)
def test_stores_and_loads_of_every_shape(shape, count):
    """9.7.16.8.1 ld, 9.7.16.8.2 st: with .32x32b a lane has a row, with .16x32bx2 two lanes have parts of one."""
    offset = f", {count}" if shape == "16x32bx2" else ""
    given, back = ([f"%r{first + i}" for i in range(count)] for first in (200, 400))
    alloc = ALLOC.replace("], 64;", "], 128;") + "@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
    form = f"sync.aligned.{shape}.x{count}.b32"
    store = f"tcgen05.st.{form} [%r44 + 0]{offset}, {{{', '.join(given)}}}; tcgen05.wait::st.sync.aligned; bar.sync 0;"
    load = f"tcgen05.ld.{form} {{{', '.join(back)}}}, [%r44 + 0]{offset}; tcgen05.wait::ld.sync.aligned;"
    values = {name: np.arange(128, dtype=np.uint32) * 128 + i for i, name in enumerate(given)}
    body = "".join([HEAD, alloc, PLACE, store, load])
    out = snippet.run(body, values, threads=128, shared=SLOT + 8)
    assert all((out[b] == values[g]).all() for b, g in zip(back, given, strict=True))
    words = out.block.keep(TensorMemory).data.reshape(128, 512)
    for thread in (0, 17, 40, 127):
        lane = thread if shape == "32x32b" else thread // 32 * 32 + thread % 16
        column = count if shape == "16x32bx2" and thread % 32 >= 16 else 0
        assert words[lane, column : column + count].tolist() == [thread * 128 + i for i in range(count)]


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    ("what", "parts", "error"),
    [
        ("the wait", [*GOOD[:6], LOAD, WAIT, FREE], Race),
        ("the commit", [*GOOD[:5], WAIT, LOAD, FREE], Stuck),
        ("mbarrier.init", [HEAD, ALLOC, PLACE, *GOOD[4:]], Misuse),
        ("tcgen05.wait::st", without(FROM_TENSOR_MEMORY, "tcgen05.wait::st.sync.aligned;"), Race),
        ("the barrier after the stores", without(FROM_TENSOR_MEMORY, STORED, STORED[:-12]), (Race, Uninitialised)),
        ("a wait before dealloc", [*GOOD[:6], FREE, WAIT], Misuse),
        ("the barrier before dealloc", [*GOOD[:-1], FREE.replace("bar.sync 0;", "")], Race),
        ("enough columns", without(GOOD, "[%r44 + 0]", "[%r44 + 40]"), OutOfBounds),
        ("its own lanes", without(GOOD, "add.s32 %r44, %r41, %r43", "mov.b32 %r44, %r41"), Misuse),
        ("the barrier before the next product", [*GOOD[:8], MMA, COMMIT, SECOND, FREE], Race),
    ],
)  # fmt: skip
def test_what_a_product_needs(what, parts, error, seed):
    a, b = operands()
    with pytest.raises(error):
        product(a, b, parts, in_tensor_memory="tcgen05.st" in "".join(parts), seed=seed)


def test_what_is_not_known_is_refused():
    a, b = operands()
    with pytest.raises(PtxError, match="not known here"):
        product(a, b, GOOD, rows=32)
    with pytest.raises(Misuse, match="cannot be allocated"):
        product(a, b, [part.replace("], 64;", "], 48;") for part in GOOD])
