"""Barriers, branches and waits: who runs, who waits for whom. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest
from memories import in_global

from ptx_check import snippet
from ptx_check.errors import Misuse, PtxError, Stuck, Uninitialised, UnknownInstruction


def test_barriers_that_cannot_be_met():
    """9.7.13.1 bar: by some warps, by some lanes of a warp, by different names."""
    part = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {limit}; @%p1 bra $OTHER;"
    with pytest.raises(Stuck, match="exited"):
        snippet.run(part.replace("{limit}", "32") + "bar.sync 0; $OTHER:", threads=64)
    with pytest.raises(Stuck, match="different barriers"):
        snippet.run(part.replace("{limit}", "32") + "bar.sync 0; ret; $OTHER: bar.sync 1;", threads=64)
    with pytest.raises(Stuck, match="wait for each other"):
        snippet.run(part.replace("{limit}", "16") + "bar.sync 0; ret; $OTHER: bar.sync 0;", threads=32)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync 0;"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_who_comes_first_waits(barrier, seed):
    """9.7.13.1 bar, barrier: the first warp branches past the other's longer way, and reads what it stores."""
    body = (
        "mov.u32 %r1, %tid.x; shl.b32 %r3, %r1, 2; xor.b32 %r4, %r3, 128; setp.lt.u32 %p1, %r1, 32; @%p1 bra $SHORT;"
        "add.s32 %r2, %r1, 5; bra.uni $MEET; $SHORT: mov.b32 %r2, %r1; $MEET: st.shared.b32 [%r3], %r2;"
        f"{barrier} ld.shared.b32 %r5, [%r4];"
    )
    out = snippet.run(body, threads=64, shared=256, seed=seed)
    assert out["%r5"].tolist() == [*range(37, 69), *range(32)]


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_barrier_of_some_warps_waits_for_those_alone(seed):
    """9.7.13.1 bar.sync a, b: two pairs of warps meet, each at a barrier of its own, and then all."""
    body = (
        "mov.u32 %r1, %tid.x; shl.b32 %r3, %r1, 2; xor.b32 %r4, %r3, 128; setp.lt.u32 %p1, %r1, 64; @%p1 bra $FIRST;"
        "st.shared.b32 [%r3], %r1; bar.sync 2, 64; ld.shared.b32 %r5, [%r4]; bra.uni $MEET;"
        "$FIRST: st.shared.b32 [%r3], %r1; bar.sync 1, 64; ld.shared.b32 %r5, [%r4]; bar.sync 1, 64;"
        "st.shared.b32 [%r4], 7; $MEET: bar.sync 0; ld.shared.b32 %r6, [%r31];"
    )
    out = snippet.run(body, {"%r31": 0}, threads=128, shared=512, seed=seed)
    assert out["%r5"].tolist() == [i ^ 32 for i in range(128)]
    assert (out["%r6"] == 7).all()


def test_barriers_that_count_wrongly():
    """9.7.13.1: all who meet there count alike, and no more come than they count."""
    part = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 64; @%p1 bra $OTHER; {first} ret; $OTHER: {second}"
    run = part.replace("{second}", "bar.sync 1, 64;")
    snippet.run(run.replace("{first}", "bar.sync 2, 64;"), threads=128)
    with pytest.raises(Misuse, match="do not count alike"):
        snippet.run(part.replace("{first}", "bar.sync 1;").replace("{second}", "bar.sync 1, 96;"), threads=128)
    with pytest.raises(Misuse, match="do not count alike"):
        snippet.run("bar.sync 1, 64;", threads=128)
    with pytest.raises(Stuck, match="exited"):
        snippet.run(run.replace("{first}", "bar.sync 2, 96;"), threads=128)
    with pytest.raises(UnknownInstruction, match=r"bar\.sync 1, 40"):
        snippet.run("bar.sync 1, 40;", threads=128)


TABLE = "$TABLE: .branchtargets $A, $B, $C; {index} brx.idx %r2, $TABLE; $A: mov.b32 %r3, 5; bra.uni $END;"
TABLE += "$B: mov.b32 %r3, 6; bra.uni $END; $C: mov.b32 %r3, 7; $END: redux.sync.add.s32 %r4, %r3, -1;"


@pytest.mark.parametrize("seed", [None, 1])
def test_a_branch_by_number(seed):
    """9.7.12.4 brx.idx: warps go ways of their own, and so may lanes, who meet again."""
    apart = TABLE.replace("{index}", "mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, {bits};")
    out = snippet.run(apart.replace("{bits}", "5"), threads=96, seed=seed)
    assert out["%r3"].tolist() == [5] * 32 + [6] * 32 + [7] * 32
    out = snippet.run(apart.replace("{bits}", "4"), threads=32, seed=seed)
    assert out["%r3"].tolist() == [5] * 16 + [6] * 16
    assert (out["%r4"] == 16 * 11).all()
    with pytest.raises(Misuse, match="target 3 of a list of 3"):
        snippet.run(apart.replace("{bits}", "5"), threads=128, seed=seed)
    with pytest.raises(Uninitialised, match="a branch"):
        snippet.run(TABLE.replace("{index}", ""), seed=seed)


def test_lanes_that_branch_apart_meet_again():
    body = (
        "mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; mov.b32 %r3, 0; $LOOP: add.s32 %r3, %r3, %r1; sub.s32 %r2, %r2, 1;"
        "setp.ge.s32 %p1, %r2, 0; @%p1 bra $LOOP; redux.sync.add.s32 %r4, %r3, -1;"
    )
    want = [i * ((i & 3) + 1) for i in range(64)]
    for seed in (None, 1, 2):
        out = snippet.run(body, threads=64, seed=seed)
        assert out["%r3"].tolist() == want
        assert out["%r4"].tolist() == [sum(want[:32])] * 32 + [sum(want[32:])] * 32


def test_lanes_that_exit_are_gone():
    body = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 8; @%p1 ret; mov.b32 %r2, 1;"
    out = snippet.run(body)
    assert out.undefined("%r2").tolist() == [i < 8 for i in range(32)]


def test_a_wait_that_never_ends(monkeypatch):
    monkeypatch.setattr("ptx_check.scheduler.STEPS", 5000)
    memory, at = in_global(np.zeros(1, np.uint32))
    with pytest.raises(Stuck, match="never ends"):
        snippet.run(
            "$L: atom.global.gpu.acquire.add.u32 %r1, [%rd1], 0; setp.eq.u32 %p1, %r1, 0; @%p1 bra $L;",
            {"%rd1": at},
            memory=memory,
        )


def test_an_error_says_where():
    with pytest.raises(PtxError) as raised:
        snippet.run("mov.b32 %r1, 99; ld.shared.b32 %r2, [%r1];", shared=16)
    assert "warps [0], at instruction 1: `ld.shared.b32 %r2, [%r1]`" in str(raised.value)
