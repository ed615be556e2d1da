"""Kernels of one instruction: inputs from memory, the instruction, its result to memory.

They compare the table with a GPU, where there is one (`test_on_gpu`). A `Probe` is PTX between "registers are loaded"
and "registers are stored", with the bits that each thread loads; `module` puts probes into one text for the assembler,
`run_here` runs one by the table. Which probes there are: `probe_list`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx_check.bits import RAW
from ptx_check.launch import launch
from ptx_check.table import Program

THREADS = 128  # of a program, unless the probe says how many; more inputs take more programs
FILL = 0xA5  # of what no result has been written to
BITS = {"%p": 32, "%rs": 16, "%r": 32, "%rd": 64}  # in memory, where a predicate is a word of 0 or 1
REGISTERS = ".reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b32 %r<400>; .reg .b64 %rd<60>;"


@dataclass(frozen=True)
class Probe:
    """One kernel.

    Args:
        form: the opcode that it is about.
        body: what runs between loads and stores. Registers from 30 (64-bit: 40) on are the harness's own.
        inputs: for each register the bits that threads load, one number for each thread; an array of all.
        results: registers that are stored.
        targets: (80, 90, 100) where the instruction exists.
        ulps: how far an approximate float32 may be from the table's, in units in the last place.
        block: threads of a program; None: any, the inputs are independent.
        shared: shared memory before the body, loaded from memory; what it is after is a result.
        label: tells apart probes of one form.
    """

    form: str
    body: str
    inputs: Mapping[str, np.ndarray]
    results: Sequence[str]
    targets: Sequence[int] = (80, 90, 100)
    ulps: int = 0
    block: int | None = None
    shared: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    label: str = ""

    @property
    def title(self) -> str:
        return f"{self.form} {self.label}".rstrip()

    @property
    def name(self) -> str:
        return "probe_" + "".join(c if c.isalnum() else "_" for c in self.title)

    @property
    def count(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def threads(self) -> int:
        return self.block or THREADS

    @property
    def programs(self) -> int:
        return -(-self.count // self.threads)


def prefix(register: str) -> str:
    return register.rstrip("0123456789")


def _load(register: str, parameter: str) -> str:
    kind, bits = prefix(register), BITS[prefix(register)]
    at = f"ld.param.b64 %rd50, [{parameter}]; mad.wide.u32 %rd51, %r380, {bits // 8}, %rd50;"
    if kind == "%p":
        return f"{at} ld.global.b32 %r381, [%rd51]; setp.ne.b32 {register}, %r381, 0;"
    return f"{at} ld.global.b{bits} {register}, [%rd51];"


def _store(register: str, parameter: str) -> str:
    kind, bits = prefix(register), BITS[prefix(register)]
    at = f"ld.param.b64 %rd50, [{parameter}]; mad.wide.u32 %rd51, %r380, {bits // 8}, %rd50;"
    if kind == "%p":
        return f"{at} selp.b32 %r381, 1, 0, {register}; st.global.b32 [%rd51], %r381;"
    return f"{at} st.global.b{bits} [%rd51], {register};"


# Each thread copies words of shared memory, a stride of all threads apart: {size} bytes, loop {label}.
_SHARED = (
    "mov.b32 %r382, global_smem; shl.b32 %r383, %r379, 2; ld.param.b64 %rd50, [{parameter}];"
    "{label}: setp.ge.u32 %p30, %r383, {size}; @%p30 bra {label}_end; add.s32 %r384, %r382, %r383;"
    "cvt.u64.u32 %rd51, %r383; add.s64 %rd51, %rd50, %rd51; {copy} add.s32 %r383, %r383, {stride}; bra.uni {label};"
    "{label}_end: bar.sync 0;"
)
_FILL = "ld.global.b32 %r381, [%rd51]; st.shared.b32 [%r384], %r381;"
_SAVE = "ld.shared.b32 %r381, [%r384]; st.global.b32 [%rd51], %r381;"


def _copy_shared(probe: Probe, parameter: str, copy: str, label: str) -> str:
    size, stride = probe.shared.nbytes, 4 * probe.threads
    return _SHARED.format(parameter=parameter, size=size, stride=stride, copy=copy, label=label)


def entry(probe: Probe) -> str:
    """The kernel: its parameters are pointers to the inputs, to shared memory's bytes, and to the results."""
    given = [f"in{i}" for i in range(len(probe.inputs))]
    asked = [f"out{i}" for i in range(len(probe.results))]
    shared = ["shared_in", "shared_out"] if probe.shared.nbytes else []
    parameters = ", ".join(f".param .u64 {name}" for name in (*given, *shared, *asked))
    lines = [
        f"mov.u32 %r379, %tid.x; mov.u32 %r378, %ctaid.x; mad.lo.s32 %r380, %r378, {probe.threads}, %r379;",
        *(_load(register, name) for register, name in zip(probe.inputs, given, strict=True)),
        _copy_shared(probe, "shared_in", _FILL, "$fill") if shared else "",
        probe.body,
        "bar.sync 0;" + _copy_shared(probe, "shared_out", _SAVE, "$save") if shared else "",
        *(_store(register, name) for register, name in zip(probe.results, asked, strict=True)),
        "ret;",
    ]
    body = "\n    ".join(filter(None, lines))
    return (
        f".visible .entry {probe.name}({parameters})\n.reqntid {probe.threads}\n{{\n    {REGISTERS}\n    {body}\n}}\n"
    )


HEAD = """.version {version}
.target {architecture}
.address_size 64
.extern .shared .align 1024 .b8 global_smem[];
"""


def version(architecture: str) -> str:
    """Of PTX: the least that knows the architecture and all probes for it, so that older assemblers take them, too.

    >>> version("sm_86"), version("sm_90a"), version("sm_100a"), version("sm_103a")
    ('7.8', '8.0', '8.6', '8.8')
    """
    number = int("".join(c for c in architecture if c.isdigit()))
    if number < 100:
        return "7.8" if number < 90 else "8.0"
    return {100: "8.6", 101: "8.6", 120: "8.7"}.get(number, "8.8")


def module(probes: Sequence[Probe], architecture: str) -> str:
    """All kernels in one text; ``architecture``: sm_80, sm_90a ..."""
    return HEAD.format(version=version(architecture), architecture=architecture) + "\n".join(map(entry, probes))


def inputs_of(probe: Probe) -> list[np.ndarray]:
    """The arrays that the kernel's input pointers point to; the last program's idle threads get copies of the first."""
    size = probe.threads * probe.programs
    arrays = []
    for register, values in probe.inputs.items():
        kind = RAW[BITS[prefix(register)] // 8]
        bits = np.ascontiguousarray(values)
        bits = bits if bits.dtype.kind in "iub" else bits.view(RAW[bits.dtype.itemsize])
        bits = bits.astype(kind) if bits.dtype.itemsize != kind.itemsize or bits.dtype.kind != "u" else bits
        arrays.append(np.resize(bits, size))
    return arrays


def outputs_of(probe: Probe) -> list[np.ndarray]:
    """Where results go, filled with what no result is."""
    size = probe.threads * probe.programs
    return [np.full(size, FILL, RAW[BITS[prefix(register)] // 8]) for register in probe.results]


def run_here(probe: Probe, seed: int | None = None, base: int = 0) -> list[np.ndarray]:
    """By the table: one array for each result, and the bytes of shared memory, which begins at ``base``, if any."""
    shared = [probe.shared.reshape(-1).view(np.uint8).copy(), np.zeros(probe.shared.nbytes, np.uint8)]
    shared = shared if probe.shared.nbytes else []
    outputs = outputs_of(probe)
    arguments = [*inputs_of(probe), *shared, *outputs]
    program = Program(module([probe], "sm_90a").replace("%r382, global_smem", f"%r382, {base}"))
    size = base + probe.shared.nbytes
    launch(program, (probe.programs,), arguments, shared_bytes=size, seed=seed, resident=2)
    return [*(output[: probe.count] for output in outputs), *shared[1:]]


def forms_in(probe: Probe) -> set[str]:
    """The instruction forms of the whole kernel, those of the harness among them."""
    return {".".join(i.opcode) for i in Program(module([probe], "sm_90a")).kernel.instructions}


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Units in the last place between float32 bits; two NaN are 0 apart, zeros of other signs and NaN alone 2^32."""
    key = [np.where(b >> 31, -(b & 0x7FFFFFFF).astype(np.int64), b.astype(np.int64)) for b in (x, y)]
    nan = [(b & 0x7FFFFFFF) > 0x7F800000 for b in (x, y)]
    apart = (nan[0] != nan[1]) | ((key[0] == key[1]) & (x != y))
    return np.where(apart, 1 << 32, np.where(nan[0], 0, np.abs(key[0] - key[1])))


def differences(probe: Probe, got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> list[str]:
    """Where results differ by more than the probe allows, in words: at most three of each result."""
    found = []
    names = [*probe.results, *(["shared memory"] if probe.shared.nbytes else [])]
    for name, x, y in zip(names, got, want, strict=True):
        bad = distance(x, y) > probe.ulps if probe.ulps else x != y
        for at in np.flatnonzero(bad)[:3].tolist():
            given = ", ".join(
                f"{r} = {int(v[at % len(v)]):#x}" for r, v in zip(probe.inputs, inputs_of(probe), strict=True)
            )
            found.append(f"{probe.form}: {name}[{at}] is {int(x[at]):#x} and not {int(y[at]):#x}, with {given}")
    return found
