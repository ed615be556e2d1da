"""wgmma: products of four warps, and the fences and waits that they need. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest
from test_warp import halves_of

from ptx_check import snippet
from ptx_check.errors import Misuse, Race, Uninitialised

FENCE = "fence.proxy.async.shared::cta;"
SYNC = "bar.sync 0;"
# A is 64 x 16 and B is 16 x 32, each within rows of 128 bytes.
N = 32
A_AT, B_AT = 0, 8192
DESCRIPTOR = 1 << 62 | 64 << 32 | 1 << 16  # swizzle 128, eight rows are 1024 bytes
ACCUMULATORS = [f"%r{100 + i}" for i in range(N // 2)]
ISSUE = (
    f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{{kind}}.{{kind}} {{{{{', '.join(ACCUMULATORS)}}}}}, "
    "{a}, %rd2, {keep}, 1, 1, {flags};"
)
COMMIT, FINISH, FENCED = (
    f"wgmma.{w}.sync.aligned{n};" for w, n in (("commit_group", ""), ("wait_group", " 0"), ("fence", ""))
)


def store_tile(shared: np.ndarray, at: int, x: np.ndarray) -> None:
    """Rows of 64 elements into lines of 128 bytes, swizzled: what a copy with this swizzle leaves."""
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            chunk = column // 8 ^ row % 8
            shared[(at + row * 128 + chunk * 16 + column % 8 * 2) // 2] = x[row, column]


def product(
    a: np.ndarray, b: np.ndarray, *, kind: str = "bf16", registers: bool = False, transposed: bool = False,
    keep: str = "0", body: str = "{issue} {commit} {finish}", prologue: str = FENCED, generic: bool = False, **extra,
) -> np.ndarray:  # fmt: skip
    """A times B by wgmma: [64, N]. Both operands are K-major, or B is N-major if ``transposed``."""
    shared = np.zeros(12288, np.uint16)
    store_tile(shared, A_AT, halves_of(np.pad(a, ((0, 0), (0, 48))), kind))
    tile = b if transposed else b.T
    store_tile(shared, B_AT, halves_of(np.pad(tile, ((0, 0), (0, 64 - tile.shape[1]))), kind))
    values = {"%rd2": DESCRIPTOR | B_AT >> 4, "%rd3": DESCRIPTOR | A_AT >> 4, **extra}
    flag = str(int(transposed))
    if registers:
        bits = halves_of(a, kind).astype(np.uint32)
        lane = np.arange(128)
        for i in range(4):  # 9.7.15.5.2: the layout of mma.m16n8k16, a warp holds 16 rows
            row = lane // 32 * 16 + lane % 32 // 4 + 8 * (i & 1)
            column = lane % 4 * 2 + 8 * (i >> 1)
            values[f"%r{50 + i}"] = bits[row, column] | bits[row, column + 1] << 16
        issue = ISSUE.format(kind=kind, a="{%r50, %r51, %r52, %r53}", keep=keep, flags=flag)
    else:
        issue = ISSUE.format(kind=kind, a="%rd3", keep=keep, flags=f"0, {flag}")
    text = prologue + body.format(issue=issue, commit=COMMIT, finish=FINISH)
    out = snippet.run(text, values, threads=128, shared=shared)
    d = np.full((64, N), np.nan, np.float32)
    for i, name in enumerate(ACCUMULATORS):
        for lane in range(128):  # 9.7.15.5.2: figure of D
            row = lane // 32 * 16 + lane % 32 // 4 + 8 * (i >> 1 & 1)
            d[row, i // 4 * 8 + lane % 4 * 2 + (i & 1)] = out.floats(name)[lane]
    return d


def operands() -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    return (chance.integers(-4, 5, shape).astype(np.float32) for shape in ((64, 16), (16, N)))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_wide_products(transposed, columns, kind):
    """9.7.15.5.1: N-major, B is in blocks of 64 columns, which the leading offset tells apart."""
    chance = np.random.default_rng(columns)
    a, b = (chance.integers(-4, 5, shape).astype(np.float32) for shape in ((64, 16), (16, columns)))
    shared = np.zeros(4096 + 64 * columns, np.uint16)
    store_tile(shared, A_AT, halves_of(a, kind))
    for first in range(0, columns, 64) if transposed else ():
        store_tile(shared, B_AT + first // 64 * 2048, halves_of(b[:, first : first + 64], kind))
    if not transposed:
        store_tile(shared, B_AT, halves_of(b.T, kind))
    names = [f"%r{100 + i}" for i in range(columns // 2)]
    form = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    issue = f"{form} {{{', '.join(names)}}}, %rd3, %rd2, 0, 1, 1, 0, {int(transposed)};"
    blocks = 1 << 62 | 64 << 32 | (2048 >> 4 if transposed else 1) << 16
    values = {"%rd2": blocks | B_AT >> 4, "%rd3": DESCRIPTOR | A_AT >> 4}
    out = snippet.run(FENCED + issue + COMMIT + FINISH, values, threads=128, shared=shared)
    got = np.stack([out.floats(name) for name in names])
    number, thread = np.indices(got.shape)  # 9.7.15.5.2: figure of D
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (number >> 1 & 1)
    assert (got == (a @ b)[row, number // 4 * 8 + thread % 4 * 2 + (number & 1)]).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_four_warps(registers, transposed, kind):
    """9.7.15.7.2 wgmma.mma_async, and 9.7.15.5.1: operands in shared memory, K-major and N-major."""
    a, b = operands()
    assert (product(a, b, kind=kind, registers=registers, transposed=transposed) == a @ b).all()
    for row, column in ((0, 0), (9, 3), (63, 15), (17, 8)):
        one = np.zeros_like(a)
        one[row, column] = 2
        assert (product(one, b, kind=kind, registers=registers, transposed=transposed) == one @ b).all()


def test_products_add_to_what_the_registers_hold():
    a, b = operands()
    held = dict.fromkeys(ACCUMULATORS, np.float32(3))
    twice = "{issue} {issue} {commit} {finish}"
    assert (product(a, b, keep="1", **held) == a @ b + 3).all()
    assert (product(a, b, keep="1", body=twice, **held) == 2 * (a @ b) + 3).all()
    with pytest.raises(Uninitialised, match="accumulator"):
        product(a, b, keep="1")


WRITE_B = "mov.u32 %r30, %tid.x; shl.b32 %r31, %r30, 2; add.s32 %r31, %r31, 8192; st.shared.b32 [%r31], 0;"


@pytest.mark.parametrize(
    ("what", "changes", "error"),
    [
        ("wgmma.wait_group", {"body": "{issue} {commit} add.f32 %r1, %r100, %r100;"}, Misuse),
        ("wgmma.commit_group", {"body": "{issue} {finish} add.f32 %r1, %r100, %r100;"}, Misuse),
        ("a wait before writing the result", {"body": "{issue} {commit} mov.b32 %r100, 0; {finish}"}, Misuse),
        ("wgmma.fence", {"prologue": ""}, Misuse),
        ("wgmma.fence after a write", {"prologue": FENCED + "mov.b32 %r50, 0;", "registers": True}, Misuse),
        ("a wait before overwriting B", {"body": "{issue} {commit} " + WRITE_B + " {finish}"}, (Misuse, Race)),
        ("a wait to overwrite A", {"body": "{issue} {commit} mov.b32 %r51, 0; {finish}", "registers": True}, Misuse),
        ("the proxy fence", {"prologue": WRITE_B + SYNC + FENCED}, Misuse),
        ("the barrier", {"prologue": WRITE_B + FENCE + FENCED}, (Misuse, Race)),
    ],
)  # fmt: skip
def test_what_a_product_needs(what, changes, error):
    a, b = operands()
    with pytest.raises(error):
        product(a, b, **changes)


def test_written_with_fence_and_barrier_it_may_be_read():
    a, b = operands()
    got = product(a, b, prologue=WRITE_B + FENCE + SYNC + FENCED)
    assert not (got[:, :4] == (a @ b)[:, :4]).all()  # the first rows of B are zeros now


def test_the_last_group_may_stay_in_flight():
    """9.7.15.7.4 wgmma.wait_group N."""
    a, b = operands()
    one = "{issue} {commit}"
    with pytest.raises(Misuse):
        product(a, b, body=one + "wgmma.wait_group.sync.aligned 1; add.f32 %r1, %r100, %r100; {finish}")
