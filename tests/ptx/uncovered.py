"""What the interpreter does not run. A test keeps this table true: an entry that becomes known has to leave it."""

# An instruction of each kind, and where it would be needed.
UNCOVERED = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, {%r9,%r10}, "
    "{%r1,%r2,%r3,%r4};": "tf32 products: the kernels ask for ieee",
    "cvt.rn.f16x2.e4m3x2 %r1, %rs1;": "fp8 key and value caches",
    "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;": "fp8 outputs",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];": "TMA stores: no kernel has one",
    "ld.acquire.gpu.global.b32 %r1, [%rd1];": "waiting for another program: no kernel does",
    "fence.acq_rel.gpu;": "order by fences: the kernels order by atomics",
    "barrier.cluster.arrive.aligned;": "clusters of blocks: no kernel has them",
    "setmaxnreg.inc.sync.aligned.u32 240;": "warp specialisation: no kernel asks for it",
    "call.uni foo, (%r1);": "function calls: everything is inlined",
}
