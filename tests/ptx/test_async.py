"""mbarriers, tensor copies, wgmma and the fences between them. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest

from tests.ptx import snippet
from tests.ptx.errors import Misuse, OutOfBounds, PtxError, Race, Stuck, Uninitialised
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.launch import Descriptor
from tests.ptx.test_warp import halves_of

ROWS, COLUMNS = 70, 200  # of the tensor; a box is 64 rows of 64 elements of 2 bytes, so 128 bytes wide
BARRIER = 16384  # the mbarrier's address, after two boxes
LEADER = "mov.u32 %r30, %tid.x; setp.eq.u32 %p9, %r30, 0; mov.b32 %r20, 16384; mov.b32 %r21, 0;"
INIT = "@%p9 mbarrier.init.shared::cta.b64 [%r20], 1;"
EXPECT = "@%p9 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 8192;"
FENCE = "fence.proxy.async.shared::cta;"
SYNC = "bar.sync 0;"
COPY = (
    "@%p9 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r21], [%rd1, {%r22, %r23}], [%r20];"
)
WAIT = "$W{n}: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r20], {parity}; @!%p8 bra $W{n};"
FIRST = WAIT.format(n=1, parity=0)
GOOD = [LEADER, INIT, SYNC, EXPECT, FENCE, SYNC, COPY, FIRST]


def tensor() -> np.ndarray:
    return (np.arange(ROWS * COLUMNS, dtype=np.uint32) * 40503 % 65521).astype(np.uint16).reshape(ROWS, COLUMNS)


def copied(
    body: list[str], start: tuple[int, int] = (0, 0), swizzle: int = 128, seed: int | None = None
) -> snippet.Snippet:
    memory, x = GlobalMemory(), tensor()
    at = memory.add("x", x.reshape(-1).view(np.uint8), np.ones(x.nbytes, bool))
    box = (64, 64) if swizzle in (0, 128) else (swizzle // 2, 64 * 128 // swizzle)
    descriptor = Descriptor(at, (COLUMNS, ROWS), (2, 2 * COLUMNS), box, 2, swizzle)
    registers = {"%rd1": 64, "%r22": start[1], "%r23": start[0]}
    return snippet.run(
        "".join(body),
        registers,
        threads=128,
        shared=BARRIER + 64,
        memory=memory,
        descriptors={64: descriptor},
        seed=seed,
    )


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("start", [(0, 0), (3, 128), (60, 190), (-5, -3)])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_a_box_arrives_swizzled_with_zeros_outside(swizzle, start, seed):
    """9.7.9.27.1.2 cp.async.bulk.tensor; 5.5.5: a chunk of 16 bytes changes places with others of its 8 lines."""
    data = copied(GOOD, start, swizzle, seed).block.shared.data
    width = swizzle // 2 or 64
    for row in range(64 * 64 // width):
        for column in range(0, width, 7):
            byte = row * 2 * width + column * 2
            line, chunk = byte // 128, byte % 128 // 16  # rows narrower than a line share it
            rounds = {0: 1, 32: 2, 64: 4, 128: 8}[swizzle]
            chunk ^= line % rounds
            got = int(data[line * 128 + chunk * 16 + byte % 16 :][:2].view(np.uint16)[0])
            y, x = start[0] + row, start[1] + column
            assert got == (int(tensor()[y, x]) if 0 <= y < ROWS and 0 <= x < COLUMNS else 0)


READ = "shl.b32 %r31, %r30, 2; ld.shared.b32 %r1, [%r31];"


@pytest.mark.parametrize(
    ("what", "body", "error"),
    [
        ("the wait", [*GOOD[:-1], READ], Race),
        ("the wait, but with a barrier", [*GOOD[:-1], SYNC, READ], Race),
        ("the wait of others than the leader", [*GOOD[:-1], "@!%p9 bra $X;", FIRST, "$X:", READ], Race),
        ("mbarrier.init", [LEADER, EXPECT, COPY, FIRST], Misuse),
        ("the arrival", [LEADER, INIT, SYNC, FENCE, SYNC, COPY, FIRST], Stuck),
        ("the copy", [LEADER, INIT, SYNC, EXPECT, FENCE, SYNC, FIRST], Stuck),
        ("half of the bytes", [part.replace("8192", "16384") for part in GOOD], Stuck),
        ("the parity", [*GOOD[:-1], WAIT.format(n=1, parity=1), READ], Race),
        ("mbarrier.inval before another mbarrier.init", [*GOOD, SYNC, INIT], Misuse),
        ("a wait before mbarrier.inval", [*GOOD[:-1], "@%p9 mbarrier.inval.shared::cta.b64 [%r20];"], Misuse),
        ("a wait before the end", GOOD[:-1], Misuse),
    ],
)  # fmt: skip
def test_what_a_copy_needs(what, body, error):
    """Each is left out in turn; the whole works."""
    assert copied([*GOOD, READ])["%r1"].any()
    with pytest.raises(error):
        copied(body)


def test_others_must_know_of_the_initialisation():
    body = [LEADER, INIT, "@!%p9 bra $X;", EXPECT, FENCE, COPY, "$X:", FIRST]
    with pytest.raises((Race, Misuse, Uninitialised)):
        copied(body, seed=1)


def test_overwriting_a_tile_needs_a_fence_and_a_barrier():
    """9.7.13.4: ordinary writes before a copy to the same place need a proxy fence; ordinary reads a barrier."""
    again = [EXPECT, COPY, WAIT.format(n=2, parity=1)]
    store = "shl.b32 %r31, %r30, 2; st.shared.b32 [%r31], %r30;"
    copied([*GOOD, READ, SYNC, *again])
    copied([*GOOD, store, FENCE, SYNC, *again])
    with pytest.raises(Race, match="has read"):
        copied([*GOOD, READ, *again])
    with pytest.raises(Misuse, match="fence"):
        copied([*GOOD, store, SYNC, *again])
    with pytest.raises(PtxError):
        copied([*GOOD, store, FENCE, *again])


def test_a_copy_outside_of_shared_memory():
    with pytest.raises(OutOfBounds):
        copied([*GOOD[:-2], COPY.replace("[%r21]", "[%r21 + 12288]"), FIRST])
    with pytest.raises(OutOfBounds, match="multiple of 128"):
        copied([*GOOD[:-2], COPY.replace("[%r21]", "[%r21 + 64]"), FIRST])


def test_phases_alternate():
    """9.7.13.15.12 mbarrier.try_wait.parity: a phase that has ended, not the one that runs."""
    second = [SYNC, EXPECT, COPY, WAIT.format(n=2, parity=1)]
    third = [SYNC, EXPECT, COPY, WAIT.format(n=3, parity=0)]
    assert copied([*GOOD, *second, *third, READ])["%r1"].any()
    with pytest.raises(PtxError):
        copied([*GOOD, *second, SYNC, EXPECT, COPY, WAIT.format(n=3, parity=1), READ])


def test_arrivals_are_counted():
    """9.7.13.15.13 mbarrier.arrive: the phase ends with the last of them, and orders what all did before."""
    start = f"{LEADER} @%p9 mbarrier.init.shared::cta.b64 [%r20], 128; {SYNC} shl.b32 %r31, %r30, 2; "
    arrive = "st.shared.b32 [%r31], %r30; mbarrier.arrive.shared::cta.b64 _, [%r20]; "
    read = "xor.b32 %r32, %r31, 128; ld.shared.b32 %r1, [%r32];"
    out = snippet.run(start + arrive + FIRST + read, threads=128, shared=BARRIER + 64, seed=1)
    assert out["%r1"].tolist() == [i ^ 32 for i in range(128)]
    with pytest.raises((Race, Uninitialised)):
        snippet.run(start + arrive + read, threads=128, shared=BARRIER + 64, seed=1)


# wgmma: A is 64 x 16 and B is 16 x 32, each within rows of 128 bytes.
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
