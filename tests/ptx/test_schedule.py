"""Barriers, branches and waits: who runs, who waits for whom. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest

from tests.ptx import snippet
from tests.ptx.errors import PtxError, Stuck
from tests.ptx.memories import in_global


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
    monkeypatch.setattr("tests.ptx.scheduler.STEPS", 5000)
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
