"""Races on shared memory: what only a barrier orders (PTX ISA 9.0, 8: memory consistency model)."""

import numpy as np
import pytest
from memories import TID

from ptx_check import snippet
from ptx_check.errors import Race, Uninitialised

EXCHANGE = f"{TID} xor.b32 %r32, %r31, 128; st.shared.b32 [%r31], %r30; {{sync}} ld.shared.b32 %r1, [%r32];"


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_a_missing_barrier_between_warps_is_a_race(seed):
    """8 (memory consistency model): also when the schedule happens to give the right value."""
    out = snippet.run(EXCHANGE.replace("{sync}", "bar.sync 0;"), threads=64, shared=256, seed=seed)
    assert out["%r1"].tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises((Race, Uninitialised)):
        snippet.run(EXCHANGE.replace("{sync}", ""), threads=64, shared=256, seed=seed)


@pytest.mark.parametrize("sync", ["bar.warp.sync -1;", "bar.sync 0;"])
def test_lanes_of_one_warp_need_a_barrier_too(sync):
    body = f"{TID} xor.b32 %r32, %r31, 4; st.shared.b32 [%r31], %r30; {{sync}} ld.shared.b32 %r1, [%r32];"
    out = snippet.run(body.replace("{sync}", sync), shared=128)
    assert out["%r1"].tolist() == [i ^ 1 for i in range(32)]
    with pytest.raises(Race, match="no barrier"):
        snippet.run(body.replace("{sync}", ""), shared=128)


def test_overwriting_what_another_warp_may_still_read_is_a_race():
    start = f"{TID} xor.b32 %r32, %r31, 128; st.shared.b32 [%r31], %r30; bar.sync 0; ld.shared.b32 %r1, [%r32];"
    snippet.run(start + "bar.sync 0; st.shared.b32 [%r31], 0;", threads=64, shared=256)
    with pytest.raises(Race) as raised:
        snippet.run(start + "st.shared.b32 [%r31], 0;", threads=64, shared=256)
    assert "which warp" in str(raised.value)
    assert "has read by `ld.shared.b32 %r1, [%r32]`" in str(raised.value)
    assert "`st.shared.b32 [%r31], 0`" in str(raised.value)


def test_a_byte_that_many_read_remembers_them():
    start = f"{TID} st.shared.b32 [%r31], %r30; bar.sync 0; mov.b32 %r3, 0; ld.shared.b32 %r1, [%r3];"
    write = "setp.eq.u32 %p1, %r30, 0; @%p1 st.shared.b32 [%r3], 9;"
    snippet.run(f"{start} bar.sync 0; {write}", threads=96, shared=384)
    with pytest.raises(Race, match="several warps"):
        snippet.run(f"{start} {write}", threads=96, shared=384)


ONE_BY_ONE = (
    "mov.u32 %r30, %tid.x; mov.b32 %r3, 0; setp.ge.u32 %p1, %r30, 64; @%p1 bra $LAST; ld.shared.b32 %r1, [%r3];"
    "setp.ge.u32 %p2, %r30, 32; @%p2 bra $SECOND; bar.sync 1, 64; ret; $SECOND: {second} ret;"
    "$LAST: bar.sync 1, 64; bar.sync 2, 64; setp.eq.u32 %p3, %r30, 64; @%p3 st.shared.b32 [%r3], 9;"
)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_readers_that_barriers_order_one_by_one(seed):
    """9.7.13.1 bar.sync a, b: a writer who met each reader alone; of a reader whom it did not meet nothing is known."""
    data = np.zeros(4, np.uint32)
    snippet.run(ONE_BY_ONE.replace("{second}", "bar.sync 2, 64;"), threads=96, shared=data, seed=seed)
    alone = ONE_BY_ONE.replace("{second}", "").replace("bar.sync 2, 64; setp", "setp")
    with pytest.raises(Race, match="byte 0 of shared memory"):
        snippet.run(alone, threads=96, shared=data, seed=seed)


def test_two_warps_that_write_the_same_byte():
    body = "mov.u32 %r30, %tid.x; shr.u32 %r2, %r30, 5; mov.b32 %r3, 0; st.shared.b32 [%r3], {value};"
    snippet.run(body.replace("{value}", "7"), threads=64, shared=16)  # the same value: which one stays does not matter
    with pytest.raises(Race):
        snippet.run(body.replace("{value}", "%r2"), threads=64, shared=16)


def test_an_atomic_and_a_plain_access_race():
    body = f"{TID} mov.b32 %r3, 0; atom.shared.add.u32 %r1, [%r3], 1; {{sync}} ld.shared.b32 %r2, [%r3];"
    out = snippet.run(body.replace("{sync}", "bar.sync 0;"), threads=64, shared=np.zeros(4, np.uint32))
    assert (out["%r2"] == 64).all()
    with pytest.raises(Race):
        snippet.run(body.replace("{sync}", ""), threads=64, shared=np.zeros(4, np.uint32), seed=1)
