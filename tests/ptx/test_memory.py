"""Loads, stores, atomics and barriers, and what they refuse. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest

from tests.ptx import snippet
from tests.ptx.errors import OutOfBounds, PtxError, Race, Stuck, Uninitialised
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.ops_memory import update_in_turn

WORDS = np.arange(1, 65, dtype=np.uint32)
TID = "mov.u32 %r30, %tid.x; shl.b32 %r31, %r30, 2;"  # %r31: the thread's word


def in_global(x: np.ndarray) -> tuple[GlobalMemory, int]:
    memory = GlobalMemory()
    return memory, memory.add("x", x.reshape(-1).view(np.uint8), np.ones(x.nbytes, bool))


def per_lane(base: int, step: int, lanes: int = 32) -> np.ndarray:
    return np.uint64(base) + np.uint64(step) * np.arange(lanes, dtype=np.uint64)


def test_loads_and_stores_of_vectors():
    """9.7.9.8 ld, 9.7.9.12 st."""
    x = np.arange(32 * 4, dtype=np.uint32)
    y = np.zeros_like(x)
    memory, at = in_global(x)
    to = memory.add("y", y.view(np.uint8), np.ones(y.nbytes, bool))
    body = "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]; st.global.v2.b32 [%rd2 + 8], {%r1, %r4};"
    out = snippet.run(body, {"%rd1": per_lane(at, 16), "%rd2": per_lane(to, 16)}, memory=memory)
    for i in range(4):
        assert out[f"%r{i + 1}"].tolist() == x[i::4].tolist()
    assert y.reshape(32, 4)[:, 2].tolist() == x[0::4].tolist()
    assert y.reshape(32, 4)[:, 3].tolist() == x[3::4].tolist()
    assert not y.reshape(32, 4)[:, :2].any()


def test_narrow_loads_extend_by_their_type_and_narrow_stores_truncate():
    memory, at = in_global(np.full(32, 0x80, np.uint8))
    body = "ld.global.b8 %rs1, [%rd1]; ld.global.s8 %rs2, [%rd1]; st.global.b8 [%rd1], %r1;"
    out = snippet.run(body, {"%rd1": per_lane(at, 1), "%r1": 0x1234}, memory=memory)
    assert (int(out["%rs1"][0]), int(out["%rs2"][0])) == (0x80, 0xFF80)
    assert (memory.regions[0].data == 0x34).all()


def test_only_lanes_whose_predicate_holds_touch_memory():
    x = np.zeros(16, np.uint32)
    memory, at = in_global(x)
    body = "setp.lt.u32 %p1, %r1, 16; mov.b32 %r2, 7; @%p1 ld.global.b32 %r2, [%rd1]; @%p1 st.global.b32 [%rd1], %r1;"
    out = snippet.run(body, {"%rd1": per_lane(at, 4), "%r1": np.arange(32)}, memory=memory)
    assert out["%r2"].tolist() == [0] * 16 + [7] * 16
    assert x.tolist() == list(range(16))


@pytest.mark.parametrize("offset", [-4, 128, 126, 2, 1 << 20])
def test_bounds_and_alignment(offset):
    memory, at = in_global(np.zeros(32, np.uint32))
    with pytest.raises(OutOfBounds):
        snippet.run("ld.global.b32 %r1, [%rd1];", {"%rd1": at + offset}, memory=memory)
    with pytest.raises(OutOfBounds):
        snippet.run("ld.shared.b32 %r1, [%r2];", {"%r2": offset % 2**32}, shared=np.zeros(32, np.uint32))


def test_what_lies_between_the_rows_of_a_view_is_out_of_bounds():
    memory = GlobalMemory()
    allowed = np.tile([True] * 8 + [False] * 8, 4)
    at = memory.add("rows", np.zeros(64, np.uint8), allowed)
    snippet.run("ld.global.b64 %rd2, [%rd1];", {"%rd1": at + 16}, memory=memory)
    with pytest.raises(OutOfBounds, match="rows"):
        snippet.run("ld.global.b64 %rd2, [%rd1];", {"%rd1": at + 24}, memory=memory)


def test_undefined_values_travel_until_something_depends_on_them():
    memory, at = in_global(np.zeros(32, np.uint32))
    fine = "add.s32 %r2, %r1, 1; selp.b32 %r3, %r2, 5, %p1; setp.eq.s32 %p2, %r3, 5; @%p2 st.global.b32 [%rd1], %r3;"
    out = snippet.run(fine, {"%p1": False, "%rd1": per_lane(at, 4)}, memory=memory)
    assert out.undefined("%r2").all()
    assert not out.undefined("%r3").any()
    assert (memory.regions[0].data.view(np.uint32) == 5).all()
    for bad in (
        "st.global.b32 [%rd1], %r1;",
        "ld.global.b32 %r2, [%rd5];",
        "setp.eq.s32 %p3, %r1, 0; @%p3 bra $L; $L:",
        "setp.eq.s32 %p3, %r1, 0; @%p3 st.global.b32 [%rd1], 1;",
        "mov.b64 %rd2, {%r1, 1}; mov.b64 {%r2, _}, %rd2; st.global.b32 [%rd1], %r2;",
        "redux.sync.add.s32 %r2, %r1, -1;",
    ):
        with pytest.raises(Uninitialised):
            snippet.run(bad, {"%rd1": per_lane(at, 4)}, memory=memory)


def test_the_halves_of_a_pair_are_undefined_apart():
    memory, at = in_global(np.zeros(32, np.uint32))
    body = "mov.b64 %rd2, {%r1, %r2}; add.f32x2 %rd3, %rd2, %rd2; mov.b64 {%r3, %r4}, %rd3;st.global.b32 [%rd1], %r4;"
    out = snippet.run(body, {"%r2": np.float32(1.5), "%rd1": per_lane(at, 4)}, memory=memory)
    assert out.floats("%r4")[0] == 3
    assert out.undefined("%r3").all()


def test_picked_bytes_are_as_defined_as_they_were():
    """16-bit numbers are packed by prmt, of which one may be undefined."""
    body = (
        "prmt.b32 %r3, %r1, %r2, 0x5410; or.b32 %r4, %r3, 256; prmt.b32 %r5, %r4, 0, 0x7771;"
        "prmt.b32 %r6, %r4, 0, 0x7772; setp.eq.s32 %p1, %r5, 1; @%p1 mov.b32 %r7, 1;"
    )
    out = snippet.run(body, {"%r1": 0x1234})
    assert not out.undefined("%r5").any()
    assert int(out["%r5"][0]) == 0x13
    assert out.undefined("%r6").all()
    packed = "prmt.b32 %r3, %r1, %r2, 0x3340; prmt.b32 %r4, %r1, %r3, 0x5410; prmt.b32 %r5, %r4, 0, 0x7772;"
    out = snippet.run(packed + "prmt.b32 %r6, %r4, 0, 0x7773;", {"%r1": 0x56})
    assert int(out["%r5"][0]) == 0x56
    assert not out.undefined("%r5").any()
    assert out.undefined("%r6").all()
    part = "setp.lt.u32 %p1, %r2, 8; mov.b32 %r4, 0; @%p1 prmt.b32 %r4, %r3, %r1, 0x5410;"
    out = snippet.run(part, {"%r1": 5, "%r2": np.arange(32)})
    assert out.undefined("%r4").tolist() == [i < 8 for i in range(32)]


def test_undefined_stays_in_the_lanes_that_were_not_written():
    out = snippet.run("setp.lt.u32 %p1, %r1, 5; @%p1 mov.b32 %r2, 1; add.s32 %r3, %r2, %r1;", {"%r1": np.arange(32)})
    assert out.undefined("%r3").tolist() == [i >= 5 for i in range(32)]


def test_shared_memory_that_nobody_wrote():
    with pytest.raises(Uninitialised, match="byte 4"):
        snippet.run("mov.b32 %r1, 0; st.shared.b32 [%r1], 7; ld.shared.b64 %rd1, [%r1];", shared=8, threads=32)


def test_undefined_values_travel_through_shared_memory():
    store = f"{TID} st.shared.b32 [%r31], %r2; bar.sync 0; "
    out = snippet.run(
        store + "ld.shared.b32 %r3, [%r31]; st.shared.b32 [%r31], 1; ld.shared.b32 %r4, [%r31];", shared=128
    )
    assert out.undefined("%r3").all()
    assert not out.undefined("%r4").any()
    with pytest.raises(Uninitialised, match="undefined bytes"):
        snippet.run(store + "atom.shared.add.u32 %r3, [%r31], 1;", shared=128)
    rows = "shl.b32 %r32, %r30, 4; ldmatrix.sync.aligned.m8n8.x1{}.shared.b16 {{%r3}}, [%r32];"
    part = f"{TID} st.shared.b32 [%r31], 7; setp.eq.u32 %p1, %r30, 9; @%p1 st.shared.b32 [%r31], %r2; bar.sync 0; "
    # Word 9 lies in row 2 of the 8 rows of 16 bytes.
    assert snippet.run(part + rows.format(""), shared=128).undefined("%r3").tolist() == [i // 4 == 2 for i in range(32)]
    assert snippet.run(part + rows.format(".trans"), shared=128).undefined("%r3").tolist() == [
        i % 4 == 1 for i in range(32)
    ]


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


def test_two_warps_that_write_the_same_byte():
    body = "mov.u32 %r30, %tid.x; shr.u32 %r2, %r30, 5; mov.b32 %r3, 0; st.shared.b32 [%r3], {value};"
    snippet.run(body.replace("{value}", "7"), threads=64, shared=16)  # the same value: which one stays does not matter
    with pytest.raises(Race):
        snippet.run(body.replace("{value}", "%r2"), threads=64, shared=16)


def test_lanes_of_a_warp_that_store_to_one_word_leave_one_of_their_values():
    """9.7.9.12: which one is left open, so the seed decides."""
    body = "mov.b32 %r1, %r2; st.shared.b32 [%r3], %r1; bar.sync 0; ld.shared.b32 %r4, [%r3];"
    found = {
        int(snippet.run(body, {"%r2": np.arange(32), "%r3": 0}, shared=4, seed=seed)["%r4"][0]) for seed in range(20)
    }
    assert len(found) > 5
    assert found <= set(range(32))


def test_atomics_return_what_they_found():
    """9.7.13.13 atom: every lane sees the sum of some others."""
    body = "atom.relaxed.sys.shared.add.u32 %r1, [%r2], %r3;"
    where = (np.arange(64) % 4 * 4).astype(np.uint32)
    add = np.arange(64, dtype=np.uint32)
    out = snippet.run(body, {"%r2": where, "%r3": add}, threads=64, shared=np.zeros(4, np.uint32))
    for word in range(4):
        mine = where == 4 * word
        order = np.argsort(out["%r1"][mine], kind="stable")
        found, added = out["%r1"][mine][order], add[mine][order]
        ends = np.cumsum(added)
        assert int(ends[-1]) == int(out.block.shared.data.view(np.uint32)[word])
        assert set(found.tolist()) <= {0, *ends.tolist()}
        # Those that added 0 found what was there; of the others, each found the sum of those before it.
        assert (found + added == ends).all() or sorted(found.tolist()) == sorted((ends - added).tolist())


@pytest.mark.parametrize(
    ("form", "function"),
    [("min.s32", min), ("max.s32", max), ("min.u32", min), ("max.u32", max), ("and.b32", lambda x, y: x & y),
     ("or.b32", lambda x, y: x | y), ("exch.b32", lambda x, y: y)],
)  # fmt: skip
def test_atomics_of_every_kind(form, function):
    values = [5, 2**32 - 3, 9, 0x80000000, 6, 1, 0xF0F0F0F0, 12] * 4
    memory, at = in_global(np.array([8], np.uint32))
    out = snippet.run(
        f"atom.global.gpu.acq_rel.{form} %r1, [%rd1], %r2;",
        {"%rd1": at, "%r2": np.array(values, np.uint32)},
        memory=memory,
    )
    signed = "s32" in form
    as_number = lambda v: v - 2**32 if signed and v >> 31 else v  # noqa: E731
    now = 8
    for lane, value in enumerate(values):
        assert int(out["%r1"][lane]) == now
        now = function(as_number(now), as_number(value)) % 2**32
    assert int(memory.regions[0].data.view(np.uint32)[0]) == now


def test_compare_and_swap():
    memory, at = in_global(np.array([3], np.uint32))
    body = "atom.global.gpu.relaxed.cas.b32 %r1, [%rd1], %r2, %r3;"
    out = snippet.run(body, {"%rd1": at, "%r2": np.arange(32), "%r3": np.arange(32) + 1}, memory=memory)
    assert out["%r1"].tolist() == [3, 3, 3, 3, *range(4, 32)]
    assert int(memory.regions[0].data.view(np.uint32)[0]) == 32


def test_sums_in_turn_agree_with_a_loop():
    chance = np.random.default_rng(0)
    where = chance.integers(0, 5, 200).astype(np.uint64) * 4
    words = chance.integers(0, 2**32, 5).astype(np.uint32)
    old, values = words[where // 4], chance.integers(0, 2**32, 200).astype(np.uint32)
    before, after = update_in_turn("add", where, old, [values])
    for lane, at in enumerate(where.tolist()):
        assert int(before[lane]) == int(words[at // 4])
        words[at // 4] = (int(words[at // 4]) + int(values[lane])) % 2**32
    assert after.tolist() == words[where // 4].tolist()


def test_an_atomic_and_a_plain_access_race():
    body = f"{TID} mov.b32 %r3, 0; atom.shared.add.u32 %r1, [%r3], 1; {{sync}} ld.shared.b32 %r2, [%r3];"
    out = snippet.run(body.replace("{sync}", "bar.sync 0;"), threads=64, shared=np.zeros(4, np.uint32))
    assert (out["%r2"] == 64).all()
    with pytest.raises(Race):
        snippet.run(body.replace("{sync}", ""), threads=64, shared=np.zeros(4, np.uint32), seed=1)


def test_barriers_that_cannot_be_met():
    """9.7.13.1 bar: by some warps, by some lanes of a warp, by different names."""
    part = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {limit}; @%p1 bra $OTHER;"
    with pytest.raises(Stuck, match="exited"):
        snippet.run(part.replace("{limit}", "32") + "bar.sync 0; $OTHER:", threads=64)
    with pytest.raises(Stuck, match="different barriers"):
        snippet.run(part.replace("{limit}", "32") + "bar.sync 0; ret; $OTHER: bar.sync 1;", threads=64)
    with pytest.raises(Stuck, match="wait for each other"):
        snippet.run(part.replace("{limit}", "16") + "bar.sync 0; ret; $OTHER: bar.sync 0;", threads=32)


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
