"""What the interpreter does not run. A test keeps this table true: an entry that becomes known has to leave it."""

from typing import NamedTuple


class Uncovered(NamedTuple):
    """An instruction of its kind, a target that has it, and why no kernel of this package needs it."""

    text: str
    target: str
    reason: str


A4, B2, C4 = "{%r1, %r2, %r3, %r4}", "{%r5, %r6}", "{%r7, %r8, %r9, %r10}"
UNCOVERED = (
    Uncovered(
        f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {A4}, {C4}, {B2}, {C4};",
        "sm_80", "tf32 products: the kernels ask for ieee ones, which are sums of fma",
    ),
    Uncovered(
        f"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {A4}, {C4}, {B2}, {C4};",
        "sm_90a", "products of fp8: caches of it are widened first",
    ),
    Uncovered(
        f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {A4}, {C4}, {B2}, {C4};",
        "sm_80", "products of integers: no kernel has one",
    ),
    Uncovered(
        "cvt.rn.f16x2.e4m3x2 %r1, %rs1;",
        "sm_90a", "fp8 by instruction: the kernels widen both formats with prmt, shifts and masks, which sm_80 has too",
    ),
    Uncovered("cvt.rn.f16x2.e5m2x2 %r1, %rs1;", "sm_90a", "the same"),
    Uncovered("cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;", "sm_90a", "fp8 results: no kernel writes any"),
    Uncovered(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];",
        "sm_90a", "TMA stores: results are stored by threads",
    ),
    Uncovered("cp.async.bulk.commit_group;", "sm_90a", "the same"),
    Uncovered("ld.acquire.gpu.global.b32 %r1, [%rd1];", "sm_80", "waiting for another program: none does"),
    Uncovered("st.release.gpu.global.b32 [%rd1], %r1;", "sm_80", "the same: order between programs is by atomics"),
    Uncovered("fence.acq_rel.gpu;", "sm_80", "order by fences: the kernels order by atomics"),
    Uncovered("membar.gl;", "sm_80", "the same"),
    Uncovered("atom.global.gpu.relaxed.add.f32 %r1, [%rd1], %r2;", "sm_80", "sums by atomics: their order is open"),
    Uncovered("ld.volatile.global.b32 %r1, [%rd1];", "sm_80", "volatile accesses: no kernel has one"),
    Uncovered("ld.local.b32 %r1, [%rd1];", "sm_80", "arrays of a thread: no kernel has one"),
    Uncovered("vote.sync.ballot.b32 %r1, %p1, -1;", "sm_80", "votes: reductions are by redux and shfl"),
    Uncovered("barrier.cluster.arrive.aligned;", "sm_90a", "clusters of blocks: the kernels run without"),
    Uncovered("mapa.u64 %rd1, %rd2, %r1;", "sm_90a", "the same"),
    Uncovered(
        "tcgen05.mma.cta_group::1.kind::tf32 [%r1], %rd1, %rd2, %r2, %p1;",
        "sm_100a", "tf32 products on tensor memory: see above",
    ),
    Uncovered(
        "tcgen05.cp.cta_group::1.128x256b [%r1], %rd1;",
        "sm_100a", "copies to tensor memory: operands come from shared memory or registers",
    ),
    Uncovered("call.uni helper;", "sm_80", "function calls: everything is inlined"),
    Uncovered("fma.rn.f64 %fd1, %fd2, %fd3, %fd4;", "sm_80", "float64: the kernels refuse it"),
)  # fmt: skip
