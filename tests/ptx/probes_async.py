"""Probes of what runs asynchronously: copies of threads, mbarriers, products of a warp group and on tensor memory.

Each is the shortest kernel in which the instruction can be used: with its fences, commits and waits.
"""

from collections.abc import Iterator

import numpy as np

from tests.ptx.probes import Probe
from tests.ptx.probes_warps import FROM_90, ONLY_90, ONLY_100, VALUES, halves, names, registers, small

TID = "mov.u32 %r379, %tid.x; setp.eq.u32 %p20, %r379, 0; "
WAIT = "$wait: mbarrier.try_wait.parity.shared::cta.b64 %p21, [%r370], 0; @!%p21 bra $wait;"
VISIBLE = "fence.proxy.async.shared::cta; bar.sync 0; "  # what the harness stored, to the asynchronous proxy


def tile(shared: np.ndarray, at: int, x: np.ndarray) -> None:
    """Rows of at most 64 numbers into lines of 128 bytes whose 16-byte chunks are exchanged (swizzle of 128 bytes)."""
    row, column = np.indices(x.shape)
    shared[(at + row * 128 + (column // 8 ^ row % 8) * 16 + column % 8 * 2) // 2] = x


def copy_probes() -> Iterator[Probe]:
    """The first warp copies, of which two lanes get zeros."""
    words = VALUES.repeat(4)[:256] ^ np.arange(256, dtype=np.uint32)
    for way, size in (("cg", 16), ("ca", 8), ("ca", 4)):
        form, count = f"cp.async.{way}.shared.global", 8 * size  # words
        where = f"mad.lo.s32 %r376, %r379, {size}, %r382; mad.wide.u32 %rd40, %r379, {size}, %rd50;"
        given = f"setp.lt.u32 %p1, %r379, 30; selp.b32 %r375, {size}, 0, %p1; setp.lt.u32 %p2, %r379, 32;"
        copy = f"@%p2 {form} [%r376], [%rd40], {size}, %r375; cp.async.commit_group; cp.async.wait_group 0;"
        body = f"{TID} ld.param.b64 %rd50, [in0]; {where} {given} {copy}"
        image = np.full(count, 0x77777777, np.uint32)
        yield Probe(form, body, {"%r10": words[:count]}, ["%r375"], block=count, shared=image, label=f"{size} bytes")


def barrier_probes() -> Iterator[Probe]:
    image = np.arange(64, dtype=np.uint32)
    init = f"{TID} mov.b32 %r370, %r382; @%p20 mbarrier.init.shared::cta.b64 [%r370], {{count}}; bar.sync 0;"
    store = "shl.b32 %r371, %r379, 2; add.s32 %r371, %r371, %r382; st.shared.b32 [%r371 + 64], %r10;"
    done = "xor.b32 %r372, %r371, 8; ld.shared.b32 %r1, [%r372 + 64]; bar.sync 0;"
    end = "@%p20 mbarrier.inval.shared::cta.b64 [%r370]; bar.sync 0; @%p20 st.shared.b64 [%r370], 5;"
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r370];"
    body = f"{init.format(count=32)} {store} {arrive} {WAIT} {done} {end}"
    yield Probe(
        "mbarrier.arrive.shared::cta.b64", body, {"%r10": VALUES[:32]}, ["%r1"], FROM_90, block=32, shared=image
    )
    expect = "mbarrier.arrive.expect_tx.shared::cta.b64"
    body = f"{init.format(count=1)} {store} bar.sync 0; @%p20 {expect} _, [%r370], 0; {WAIT} {done} {end}"
    yield Probe(expect, body, {"%r10": VALUES[:32]}, ["%r1"], FROM_90, block=32, shared=image)


def wgmma_probes() -> Iterator[Probe]:
    """A is 64 x 16 at byte 0, B 16 x N behind it; both K-major, or B N-major (transposed)."""
    for kind in ("f16", "bf16"):
        for columns in (32, 64, 128, 256):
            for transposed in (0, 1) if columns == 64 else (0,):
                a, b = small(64, 16), small(16, columns)
                image = np.zeros((64 + max(columns, 64)) * 64, np.uint16)
                tile(image, 0, halves(a, kind))
                tile(image, 8192, halves(b if transposed else np.ascontiguousarray(b.T), kind))
                results = names(100, columns // 2)
                form = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
                # 9.7.15.5.1: a descriptor is an address / 16, strides / 16 (eight lines are 1024 bytes), the swizzle.
                where = (
                    "shr.u32 %r371, %r382, 4; and.b32 %r371, %r371, 16383; cvt.u64.u32 %rd40, %r371;"
                    f"mov.b64 %rd41, {1 << 62 | 64 << 32 | 1 << 16}; or.b64 %rd42, %rd40, %rd41;"
                    "add.s64 %rd43, %rd42, 512;"
                )
                issue = f"{form} {registers(100, columns // 2)}, %rd42, %rd43, 0, 1, 1, 0, {transposed};"
                ends = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
                body = f"{VISIBLE} {where} wgmma.fence.sync.aligned; {issue} {ends}"
                yield Probe(
                    form, body, {"%r10": np.arange(128, dtype=np.uint32)}, results, ONLY_90, block=128, shared=image,
                    label="N-major" if transposed else "",
                )  # fmt: skip


ALLOC = (
    "setp.lt.u32 %p22, %r379, 32; add.s32 %r373, %r382, 65024;"
    "@%p22 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r373], 128; bar.sync 0;"
    "ld.shared.b32 %r374, [%r373];"
    "@%p22 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; shr.u32 %r375, %r379, 5;"
    "shl.b32 %r375, %r375, 21; add.s32 %r376, %r374, %r375;"  # a warp's own lanes
)
FREE = "bar.sync 0; @%p22 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r374, 128;"
ROOM = 65280  # bytes of shared memory: the address of tensor memory is near the end


def tensor_probes() -> Iterator[Probe]:
    image = np.zeros(ROOM // 2, np.uint16)
    shapes = [("32x32b", count, "") for count in (32, 64, 128)]
    shapes += [("16x32bx2", count, f", {count}") for count in (8, 16, 32, 64)]
    for shape, count, offset in shapes:
        given = {f"%r{100 + i}": np.arange(128, dtype=np.uint32) * 64 + i for i in range(count)}
        form = f"tcgen05.ld.sync.aligned.{shape}.x{count}.b32"
        at = f"[%r376 + 0]{offset}"
        store = f"{form.replace('.ld.', '.st.')} {at}, {registers(100, count)}; tcgen05.wait::st.sync.aligned;"
        load = f"{form} {registers(230, count)}, {at}; tcgen05.wait::ld.sync.aligned;"
        body = f"{TID} {ALLOC} {store} bar.sync 0; {load} {FREE}"
        yield Probe(form, body, given, names(230, count), ONLY_100, block=128, shared=image)
    for kind in ("f16", "bf16"):
        for rows in (64, 128):
            yield tensor_product(kind, rows)


def tensor_product(kind: str, rows: int) -> Probe:
    """A is [rows, 16] at byte 0, B 16 x 32 at 16384, both K-major; the mbarrier is at 32768."""
    columns = 32
    image = np.zeros(ROOM // 2, np.uint16)
    tile(image, 0, halves(small(rows, 16), kind))
    tile(image, 16384, halves(np.ascontiguousarray(small(16, columns).T), kind))
    # 9.7.16.4.1: as for wgmma, but version 1 and a code of its own for the swizzle.
    where = (
        "shr.u32 %r371, %r382, 4; and.b32 %r371, %r371, 16383; cvt.u64.u32 %rd40, %r371;"
        f"mov.b64 %rd41, {2 << 61 | 1 << 46 | 64 << 32 | 1 << 16}; or.b64 %rd42, %rd40, %rd41;"
        "add.s64 %rd43, %rd42, 1024;"
    )
    code = {"f16": 0, "bf16": 1}[kind]
    how = 1 << 4 | code << 7 | code << 10 | columns // 8 << 17 | rows // 16 << 24  # 9.7.16.4.2
    init = "add.s32 %r370, %r382, 32768; @%p20 mbarrier.init.shared::cta.b64 [%r370], 1; bar.sync 0;"
    form = "tcgen05.mma.cta_group::1.kind::f16"
    issue = f"mov.b32 %r372, {how}; mov.pred %p23, 0; @%p20 {form} [%r374 + 0], %rd42, %rd43, %r372, %p23;"
    commit = "@%p20 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r370];"
    # 64 rows are in the first 16 of every 32 lanes, and there are 32 columns.
    shape, count, offset = ("32x32b", 32, "") if rows == 128 else ("16x32bx2", 16, ", 16")
    load = f"tcgen05.ld.sync.aligned.{shape}.x{count}.b32 {registers(200, count)}, [%r376 + 0]{offset};"
    order = "tcgen05.wait::ld.sync.aligned;"
    ends = "bar.sync 0; @%p20 mbarrier.inval.shared::cta.b64 [%r370]; bar.sync 0; @%p20 st.shared.b64 [%r370], 5;"
    body = f"{TID} {ALLOC} {init} {VISIBLE} {where} {issue} {commit} {WAIT} {load} {order} {FREE} {ends}"
    inputs = {"%r10": np.arange(128, dtype=np.uint32)}
    return Probe(form, body, inputs, names(200, count), ONLY_100, block=128, shared=image, label=f"{kind}, {rows} rows")


def async_probes() -> Iterator[Probe]:
    for made in (copy_probes, barrier_probes, wgmma_probes, tensor_probes):
        yield from made()
