"""mbarriers, tensor copies and the fence between them. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest

from ptx_check import snippet
from ptx_check.errors import Misuse, OutOfBounds, PtxError, Race, Stuck, Uninitialised
from ptx_check.global_memory import GlobalMemory
from ptx_check.launch import Descriptor

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


def test_a_box_of_four_dimensions():
    """9.7.9.27.1.2: coordinates count from the innermost dimension; what lies outside of any of them is zeros."""
    x = np.arange(2 * 3 * 10 * 64, dtype=np.uint16).reshape(2, 3, 10, 64)
    memory = GlobalMemory()
    at = memory.add("x", x.reshape(-1).view(np.uint8), np.ones(x.nbytes, bool))
    descriptor = Descriptor(at, (64, 10, 3, 2), (2, 128, 1280, 3840), (64, 8, 1, 1), 2, 0)
    copy = COPY.replace("2d", "4d").replace("{%r22, %r23}", "{%r22, %r23, %r24, %r25}")
    body = [part.replace("8192", "1024") for part in (*GOOD[:-2], copy, FIRST)]
    for start in ((0, 0, 0, 0), (0, 5, 2, 1), (-3, 0, 1, 0), (0, 0, 3, 0)):
        registers = {"%rd1": 64, **{f"%r{22 + i}": value for i, value in enumerate(start)}}
        options = {"threads": 128, "shared": BARRIER + 64, "memory": memory, "descriptors": {64: descriptor}}
        got = snippet.run("".join(body), registers, **options).block.shared.data[:1024].view(np.uint16).reshape(8, 64)
        padded = np.pad(x, ((0, 8), (0, 8), (8, 8), (8, 64)))[start[3], start[2]]
        assert (got == padded[start[1] + 8 :][:8, start[0] + 8 :][:, :64]).all()
