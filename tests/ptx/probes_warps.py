"""Probes of instructions of a warp or a block: shuffles, memory, matrix products, and what runs asynchronously.

Matrices hold small integers, so that every order of summing gives the same bits. Addresses of shared memory begin at
%r382, which the harness has set.
"""

from collections.abc import Iterator

import numpy as np

from tests.ptx.probes import Probe

VALUES = (np.arange(64, dtype=np.uint64) * 2654435761 & 0xFFFFFFFF).astype(np.uint32)
LANE = np.arange(32, dtype=np.uint32)
FROM_90, ONLY_90, ONLY_100 = (90, 100), (90,), (100,)


def small(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(np.float32)


def halves(x: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of small integers, which both formats hold exactly."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def names(first: int, count: int) -> list[str]:
    return [f"%r{first + i}" for i in range(count)]


def warp_probes() -> Iterator[Probe]:
    for mode, controls in (
        ("up", (0, 0x0F00)),
        ("down", (0x1F, 0x181F)),
        ("bfly", (0x1F, 0x0707)),
        ("idx", (0x1F, 0x1C1F)),
    ):
        form = f"shfl.sync.{mode}.b32"
        steps = [(by, control) for by in (0, 1, 2, 5, 16, 31) for control in controls]
        body = "".join(f"{form} %r{100 + i}, %r10, {by}, {control}, -1;" for i, (by, control) in enumerate(steps))
        yield Probe(form, body, {"%r10": VALUES}, names(100, len(steps)), block=64)
    for word in ("add.s32", "add.u32", "min.s32", "min.u32", "max.s32", "max.u32", "and.b32", "or.b32", "xor.b32"):
        yield Probe(f"redux.sync.{word}", f"redux.sync.{word} %r1, %r10, -1;", {"%r10": VALUES}, ["%r1"], block=64)
    numbers = np.linspace(-3, 3, 64).astype(np.float32)
    numbers[7] = np.nan
    for word in ("min", "max", "min.NaN", "max.NaN"):
        form = f"redux.sync.{word}.f32"
        yield Probe(form, f"{form} %r1, %r10, -1;", {"%r10": numbers.view(np.uint32)}, ["%r1"], ONLY_100, block=64)
    # Which lane is elected is left open; that it is one of each warp is not.
    one = "elect.sync _|%p1, -1; selp.b32 %r1, 1, 0, %p1; redux.sync.add.s32 %r1, %r1, -1;"
    yield Probe("elect.sync", one, {"%r10": VALUES}, ["%r1"], FROM_90, block=64)
    meet = "bar.warp.sync -1; bar.sync 0; barrier.sync 0; add.s32 %r1, %r10, 1;"
    yield Probe("barrier.sync", meet, {"%r10": VALUES}, ["%r1"], block=64)
    apart = (
        "$table: .branchtargets $one, $other; and.b32 %r2, %r10, 1; brx.idx %r2, $table;"
        "$one: add.s32 %r1, %r10, 7; bra.uni $end; $other: xor.b32 %r1, %r10, 255; $end: bar.warp.sync -1;"
    )
    yield Probe("brx.idx", apart, {"%r10": VALUES}, ["%r1"], block=64)


def mma_places(count: int, rows: bool) -> tuple[np.ndarray, np.ndarray]:
    """[lanes, 2 * count]: row and column of the elements of A (``rows``), or depth and column of B (9.7.14.5.8)."""
    lane, i = np.arange(32)[:, None], np.arange(2 * count)[None, :]
    inner = lane % 4 * 2 + (i & 1)
    if rows:
        return lane // 4 + 8 * (i >> 1 & 1), inner + 8 * (i >> 2)
    return inner + 8 * (i >> 1), lane // 4 + 0 * i


def matrix_probes() -> Iterator[Probe]:
    for kind in ("f16", "bf16"):
        form = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        a, b = small(16, 16), small(16, 8)
        inputs = {}
        for first, x, count in ((10, a, 4), (20, b, 2)):
            pairs = np.ascontiguousarray(halves(x, kind)[mma_places(count, first == 10)]).view(np.uint32)
            inputs |= {f"%r{first + i}": pairs[:, i] for i in range(count)}
        inputs |= {f"%r{30 + i}": (LANE * 4 + i).astype(np.float32).view(np.uint32) for i in range(4)}
        operands = ", ".join(registers(first, n) for first, n in ((1, 4), (10, 4), (20, 2), (30, 4)))
        yield Probe(form, f"{form} {operands};", inputs, names(1, 4), block=32)
    image = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8) + 100
    rows = {"%r10": (31 - LANE) * 16}
    for count in (1, 2, 4):
        for trans in ("", ".trans"):
            suffix = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
            load = f"add.s32 %r11, %r10, %r382; ldmatrix.{suffix} {registers(1, count)}, [%r11];"
            yield Probe(f"ldmatrix.{suffix}", load, rows, names(1, count), block=32, shared=image)
            held = {**rows, **{f"%r{20 + i}": VALUES[i : i + 32] for i in range(count)}}
            store = f"add.s32 %r11, %r10, %r382; stmatrix.{suffix} [%r11], {registers(20, count)};"
            yield Probe(f"stmatrix.{suffix}", store, held, ["%r10"], FROM_90, block=32, shared=image)


def memory_probes() -> Iterator[Probe]:
    words = VALUES.repeat(4)[:256]
    words = words ^ np.arange(256, dtype=np.uint32)
    place = "mov.u32 %r379, %tid.x; "
    for form, bits in (
        ("b8", 8), ("b16", 16), ("b32", 32), ("b64", 64), ("s32", 32), ("v2.b8", 8), ("v2.b16", 16), ("v4.b16", 16),
        ("v2.b32", 32), ("v4.b32", 32), ("v2.b64", 64),
    ):  # fmt: skip
        count = int(form[1]) if form[0] == "v" else 1
        register = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
        loaded = [f"{register}{1 + i}" for i in range(count)]
        vector = "{" + ", ".join(loaded) + "}" if count > 1 else loaded[0]
        at = f"{place} mad.lo.s32 %r377, %r379, {count * bits // 8}, %r382; "
        load = f"{at} ld.shared.{form} {vector}, [%r377];"
        yield Probe(f"ld.shared.{form}", load, {"%r10": VALUES[:32]}, loaded, block=32, shared=words)
        given = {f"{register}{10 + i}": VALUES[i : i + 32].astype(f"u{max(bits, 16) // 8}") for i in range(count)}
        vector = "{" + ", ".join(given) + "}" if count > 1 else next(iter(given))
        if form != "s32":
            store = f"{at} st.shared.{form} [%r377], {vector};"
            yield Probe(f"st.shared.{form}", store, given, ["%r379"], block=32, shared=words)
    store = f"{place} shl.b32 %r377, %r379, 2; add.s32 %r377, %r377, %r382; st.shared::cta.b32 [%r377], %r10;"
    yield Probe("st.shared::cta.b32", store, {"%r10": VALUES[:32]}, ["%r379"], block=32, shared=words)
    # Vectors of the first input's own numbers: 32 lanes of every warp read (and write) the same.
    at = f"{place} and.b32 %r377, %r379, 31; ld.param.b64 %rd50, [in0]; mad.wide.u32 %rd40, %r377, {{size}}, %rd50;"
    for count in (2, 4):
        load = at.format(size=4 * count) + f"ld.global.v{count}.b32 {registers(1, count)}, [%rd40];"
        yield Probe(f"ld.global.v{count}.b32", load, {"%r10": words[:128]}, names(1, count))
        values = "xor.b32 %r20, %r377, 77; add.s32 %r21, %r20, 5; mul.lo.s32 %r22, %r20, 9; not.b32 %r23, %r20;"
        store = f"bar.sync 0; st.global.v{count}.b32 [%rd40], {registers(20, count)}; bar.sync 0;"
        own = "mad.wide.u32 %rd41, %r379, 4, %rd50; ld.global.b32 %r1, [%rd41];"
        body = f"{at.format(size=4 * count)} {values} {store} {own}"
        yield Probe(f"st.global.v{count}.b32", body, {"%r10": words[: 32 * count]}, ["%r1"], block=32 * count)
    own = f"{place} ld.param.b64 %rd50, [in0]; mad.wide.u32 %rd40, %r379, 4, %rd50;"
    for word in ("add.u32", "min.s32", "max.u32", "exch.b32", "and.b32", "or.b32"):
        body = f"{own} atom.global.gpu.acq_rel.{word} %r1, [%rd40], %r11; ld.global.b32 %r2, [%rd40];"
        inputs = {"%r10": words[:128], "%r11": words[128:]}
        yield Probe(f"atom.global.gpu.acq_rel.{word}", body, inputs, ["%r1", "%r2"])
    body = f"{own} red.global.gpu.relaxed.add.u32 [%rd40], %r11; ld.global.b32 %r1, [%rd40];"
    yield Probe("red.global.gpu.relaxed.add.u32", body, {"%r10": words[:128], "%r11": words[128:]}, ["%r1"])
    body = f"{place} mad.lo.s32 %r377, %r379, 0, %r382; atom.relaxed.sys.shared.add.u32 %r3, [%r377], %r10;"
    total = f"{body} bar.sync 0; ld.shared.b32 %r1, [%r377];"  # what a thread finds depends on who was first
    yield Probe("atom.relaxed.sys.shared.add.u32", total, {"%r10": VALUES}, ["%r1"], block=64, shared=words)


def all_probes() -> list[Probe]:
    """Those of `probes_numbers` too."""
    from tests.ptx.probes_async import async_probes
    from tests.ptx.probes_numbers import number_probes

    return [*number_probes(), *warp_probes(), *matrix_probes(), *memory_probes(), *async_probes()]
