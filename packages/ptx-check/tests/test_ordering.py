"""The order of what several programs do in global memory (PTX ISA 9.0, 8: memory consistency model).

Where the program that finishes last reads what the others wrote, each has to release it and the last one to acquire
it all; on a GPU, leaving that out mostly works.
"""

import numpy as np
import pytest

from ptx_check.errors import Race
from ptx_check.launch import launch
from ptx_check.table import Program

PROGRAMS = 6
# Each program stores a number, counts itself, and the last one adds all of them up.
SUM_UP = """
.visible .entry sum_up(.param .u64 numbers, .param .u64 count, .param .u64 total) .reqntid 64
{{
    .reg .pred %p<9>; .reg .b32 %r<19>; .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [numbers]; ld.param.b64 %rd2, [count]; ld.param.b64 %rd3, [total];
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0;
    mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd1, %rd4;
    setp.eq.u32 %p2, %r2, {writer}; add.s32 %r3, %r1, 10;
    @%p2 st.global.b32 [%rd4], %r3;
    {before}
    mov.b32 %r4, 0;
    @%p1 {count} %r4, [%rd2], 1;
    @%p1 st.shared.b32 [%r9], %r4;
    bar.sync 0;
    ld.shared.b32 %r4, [%r9];
    setp.ne.u32 %p3, %r4, {last}; @%p3 bra $END;
    mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b64 %rd5, %rd1;
    $LOOP: ld.global.b32 %r7, [%rd5]; add.s32 %r5, %r5, %r7; add.s64 %rd5, %rd5, 4;
    add.s32 %r6, %r6, 1; setp.lt.u32 %p4, %r6, {programs}; @%p4 bra $LOOP;
    setp.eq.u32 %p5, %r2, 40;
    @%p5 st.global.b32 [%rd3], %r5;
    $END: ret;
}}
""".replace("ld.param.b64 %rd1, [numbers];", "mov.b32 %r9, 0; ld.param.b64 %rd1, [numbers];")


def sum_up(count: str, seed: int | None, writer: int = 0, before: str = "bar.sync 0;") -> int:
    text = SUM_UP.format(count=count, writer=writer, before=before, last=PROGRAMS - 1, programs=PROGRAMS)
    total = np.zeros(1, np.uint32)
    numbers, counter = np.zeros(PROGRAMS, np.uint32), np.zeros(1, np.uint32)
    launch(Program(text), (PROGRAMS,), [numbers, counter, total], shared_bytes=16, seed=seed, resident=3)
    return int(total[0])


SEEDS = (None, 1, 2, 3, 4)
RIGHT = sum(range(10, 10 + PROGRAMS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ["acq_rel.gpu", "acq_rel.sys"])
def test_release_and_acquire_order_programs(order, seed):
    assert sum_up(f"atom.global.{order}.add.u32", seed) == RIGHT


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ["release.gpu", "acquire.gpu", "relaxed.gpu", "acq_rel.cta"])
def test_half_of_it_does_not(order, seed):
    """8.9.3 synchronizes-with needs both, at a scope that holds both programs; whatever the schedule was."""
    with pytest.raises(Race, match="nothing orders the two"):
        sum_up(f"atom.global.{order}.add.u32", seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_barriers_around_it_carry_the_order_to_other_threads(seed):
    """8.9.5 causality order: another warp's store before the barrier is released too, and its load is after."""
    good = "atom.global.gpu.acq_rel.add.u32"
    assert sum_up(good, seed, writer=33) == RIGHT
    with pytest.raises(Race):
        sum_up(good, seed, writer=33, before="")


def test_programs_that_write_the_same_byte():
    text = """
    .visible .entry clash(.param .u64 out) .reqntid 32
    { .reg .b32 %r<9>; .reg .b64 %rd<9>; ld.param.b64 %rd1, [out];
      mov.u32 %r1, %ctaid.x; st.global.b32 [%rd1], VALUE; ret; }
    """
    launch(Program(text.replace("VALUE", "7")), (2,), [np.zeros(1, np.uint32)])  # the same value: no matter which stays
    with pytest.raises(Race, match="which program 0 has written"):
        launch(Program(text.replace("VALUE", "%r1")), (2,), [np.zeros(1, np.uint32)])


def test_reading_what_another_program_overwrites():
    """In both orders: the one that reads may be first."""
    text = """
    .visible .entry shift(.param .u64 x) .reqntid 32
    { .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<2>; mov.u32 %r3, %tid.x; setp.ne.u32 %p1, %r3, 0; @%p1 ret;
      ld.param.b64 %rd1, [x]; mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2;
      ld.global.b32 %r2, [%rd2 + OFFSET]; add.s32 %r2, %r2, 5; st.global.b32 [%rd2], %r2; ret; }
    """
    for seed in SEEDS:
        launch(Program(text.replace("OFFSET", "0")), (4,), [np.arange(5, dtype=np.uint32)], seed=seed)
        with pytest.raises(Race, match="program"):
            launch(Program(text.replace("OFFSET", "4")), (4,), [np.arange(5, dtype=np.uint32)], seed=seed, resident=2)
