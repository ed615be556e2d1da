"""Registers and bytes that nobody wrote, followed until something depends on them."""

import numpy as np
import pytest
from memories import TID, in_global, per_lane

from ptx_check import snippet
from ptx_check.errors import Uninitialised


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


def test_of_several_numbers_read_at_once_one_may_be_unwritten_until_something_depends_on_it():
    """Compilers read four where they want three."""
    body = (
        "st.shared.v2.b32 [%r9], {7, 8}; st.shared.b32 [%r9+8], 9; bar.sync 0;"
        "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9]; add.s32 %r5, %r1, %r3;"
    )
    out = snippet.run(body, {"%r9": 0}, shared=16)
    assert out["%r5"].tolist() == [16] * 32
    assert out.undefined("%r4").all()
    assert not any(out.undefined(f"%r{n}").any() for n in (1, 2, 3))
    with pytest.raises(Uninitialised, match="a branch depends on %p1"):
        snippet.run(f"{body} setp.eq.s32 %p1, %r4, 0; @%p1 bra $L; $L:", {"%r9": 0}, shared=16)
    memory, at = in_global(np.zeros(32, np.uint32))
    with pytest.raises(Uninitialised):
        snippet.run(f"{body} st.global.b32 [%rd1], %r4;", {"%r9": 0, "%rd1": per_lane(at, 4)}, memory=memory, shared=16)
    half = body.replace("st.shared.b32 [%r9+8]", "st.shared.b8 [%r9+8]")
    assert snippet.run(half, {"%r9": 0}, shared=16).undefined("%r3").all(), "three of its bytes were never written"
    with pytest.raises(Uninitialised, match="reads byte 0"):
        snippet.run("ld.shared.v2.b32 {%r1, %r2}, [%r9];", {"%r9": 0}, shared=16)


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
