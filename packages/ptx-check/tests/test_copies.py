"""Asynchronous copies of single threads (PTX ISA 9.0, 9.7.9.25.3: cp.async)."""

import numpy as np
import pytest
from memories import in_global, per_lane

from ptx_check import snippet
from ptx_check.errors import Misuse, Race

COPY = "cp.async.cg.shared.global [%r1], [%rd1], 0x10, %r2; cp.async.commit_group;"


def copy_arguments() -> tuple[dict, dict, np.ndarray]:
    x = np.arange(128, dtype=np.uint32)
    memory, at = in_global(x)
    registers = {"%rd1": per_lane(at, 16), "%r1": np.arange(32) * 16, "%r2": np.where(np.arange(32) < 30, 16, 0)}
    return registers, {"memory": memory, "shared": 512}, np.where(np.arange(128) < 120, x, 0)


def test_copies_arrive_when_they_are_waited_for():
    """9.7.9.25.3 cp.async: bytes beyond the source size are zeros."""
    registers, options, want = copy_arguments()
    body = f"{COPY} cp.async.wait_group 0; bar.sync 0; ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r1];"
    out = snippet.run(body, registers, **options)
    assert np.stack([out[f"%r{i}"] for i in range(3, 7)], 1).reshape(-1).tolist() == want.tolist()


@pytest.mark.parametrize(("way", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_every_size(way, size):
    x = np.arange(8 * size, dtype=np.uint32)
    memory, at = in_global(x)
    copy = f"cp.async.{way}.shared.global [%r1], [%rd1], {size}; cp.async.commit_group; cp.async.wait_group 0;"
    registers = {"%rd1": per_lane(at, size), "%r1": np.arange(32) * size}
    out = snippet.run(copy, registers, memory=memory, shared=32 * size)
    assert (out.block.shared.data.view(np.uint32) == x).all()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;", "bar.sync 0;"])
def test_a_copy_that_nobody_waits_for_has_not_arrived(wait):
    registers, options, _ = copy_arguments()
    with pytest.raises(Race, match="in flight"):
        snippet.run(f"{COPY} {wait} ld.shared.b32 %r3, [%r1];", registers, **options)
    registers, options, _ = copy_arguments()
    with pytest.raises(Race, match="in flight"):
        snippet.run(f"{COPY} {wait} st.shared.b32 [%r1], 1;", registers, **options)


def test_waiting_for_all_but_the_youngest_group():
    registers, options, want = copy_arguments()
    second = COPY.replace("%r1]", "%r7]")
    registers["%r7"] = registers["%r1"] + 512
    options["shared"] = 1024
    body = f"{COPY} {second} cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r3, {{}};"
    out = snippet.run(body.format("[%r1]"), registers, **options)
    assert out["%r3"].tolist() == want[::4].tolist()
    registers["%rd1"] = per_lane(options["memory"].regions and 1 << 40, 16)
    with pytest.raises(Race, match="in flight"):
        snippet.run(body.format("[%r7]"), registers, **options)


def test_a_waiting_thread_has_only_its_own_copies():
    registers, options, _ = copy_arguments()
    body = f"{COPY} cp.async.wait_group 0; {{}} xor.b32 %r8, %r1, 16; ld.shared.b32 %r3, [%r8];"
    snippet.run(body.format("bar.sync 0;"), registers, **options)
    registers, options, _ = copy_arguments()
    with pytest.raises(Race):
        snippet.run(body.format(""), registers, **options)


def test_misuse_of_partial_copies_is_not_silent():
    registers, options, _ = copy_arguments()
    registers["%r2"] = 7
    with pytest.raises(Misuse):
        snippet.run(COPY, registers, **options)
