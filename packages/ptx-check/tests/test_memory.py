"""Loads, stores and atomics, and the bounds of tensors. Sections are those of PTX ISA 9.0."""

import numpy as np
import pytest
from memories import in_global, per_lane

from ptx_check import snippet
from ptx_check.errors import OutOfBounds
from ptx_check.global_memory import GlobalMemory
from ptx_check.ops_memory import update_in_turn


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


VECTORS = ("v2.b8", "b8", "b16", "s32", "v2.b16", "v4.b16", "b32", "v2.b32", "v4.b32", "b64", "v2.b64")


@pytest.mark.parametrize("form", VECTORS)
@pytest.mark.parametrize("space", ["shared", "shared::cta", "global"])
def test_every_width(space, form):
    """9.7.9.8 ld, 9.7.9.12 st: elements lie one after the other, the first lowest."""
    bits, count = int(form.split(".")[-1][1:]), int(form[1]) if form[0] == "v" else 1
    register = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    names = [f"{register}{1 + i}" for i in range(count)]
    vector = "{" + ", ".join(names) + "}" if count > 1 else names[0]
    size = bits // 8 * count
    image = (np.arange(32 * size) * 37 % 251).astype(np.uint8)
    memory, at = in_global(image)
    to = memory.add("copy", np.zeros(32 * size, np.uint8), np.ones(32 * size, bool))
    if space == "global":
        registers, source, target = {"%rd40": per_lane(at, size), "%rd41": per_lane(to, size)}, "[%rd40]", "[%rd41]"
    else:
        lanes = np.arange(32, dtype=np.uint32) * size
        registers, source, target = {"%r40": lanes, "%r41": lanes + 32 * size}, "[%r40]", "[%r41]"
    store = form.replace("s32", "b32")
    body = f"ld.{space}.{form} {vector}, {source}; st.{space}.{store} {target}, {vector};"
    out = snippet.run(body, registers, memory=memory, shared=np.concatenate([image, np.zeros_like(image)]))
    elements = image.view(f"u{bits // 8}").reshape(32, count)
    for i, name in enumerate(names):
        assert out[name].tolist() == elements[:, i].tolist()
    copied = memory.regions[1].data if space == "global" else out.block.shared.data[32 * size :]
    assert (copied == image).all()


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
     ("or.b32", lambda x, y: x | y), ("exch.b32", lambda x, y: y), ("add.u32", lambda x, y: x + y)],
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
