"""The table against hardware: kernels of one instruction each, bit for bit; approximate ones within their error.

`make test-gpu` runs this on a GPU. Without one the same kernels are assembled for three of them, and the table stands
in for the hardware, so that inputs, harness and comparison are tried end to end.
"""

import numpy as np
import pytest
import torch

from ptx_check import snippet
from ptx_check.errors import PtxError
from tests.ptx import probes
from tests.ptx.cuda_driver import Gpu, architecture, assemble, generation
from tests.ptx.probes import FILL, Probe, differences, distance, inputs_of, module, prefix, run_here
from tests.ptx.probes_warps import all_probes, small

PROBES = all_probes()
BY_TITLE = {probe.title: probe for probe in PROBES}
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}

pytest.importorskip("triton")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None,
    reason="needs an NVIDIA GPU: it runs single instructions on one and compares them with the interpreter's table",
)


@pytest.fixture(scope="module")
def gpu():
    capability = torch.cuda.get_device_capability()
    known = [probe for probe in PROBES if generation(capability) in probe.targets]
    return Gpu(assemble(known, architecture(capability)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("title", BY_TITLE)
def test_a_gpu_gives_what_the_table_says(title, request):
    probe = BY_TITLE[title]
    capability = torch.cuda.get_device_capability()
    if generation(capability) not in probe.targets:
        pytest.skip(f"GPUs of capability {capability[0]}.{capability[1]} have no {probe.form}")
    got = request.getfixturevalue("gpu").run(probe)
    assert differences(probe, got, run_here(probe)) == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_are_assembled(target):
    known = [probe for probe in PROBES if target in probe.targets]
    assert len(known) > 200
    assert assemble(known, TARGETS[target]).startswith(b"\x7fELF")


@pytest.mark.parametrize(("target", "older"), [(80, "7.7"), (90, "7.8"), (100, "8.5")])
def test_no_older_version_of_ptx_has_all_kernels(target, older, monkeypatch):
    """So the kernels ask for the least: the assembler of an older Triton knows no newer one."""
    monkeypatch.setattr(probes, "version", lambda architecture: older)
    with pytest.raises(RuntimeError, match=r"requires PTX ISA \.version"):
        assemble([probe for probe in PROBES if target in probe.targets], TARGETS[target])


def test_what_cannot_be_assembled_is_said():
    probe = Probe("frob.b32", "frob.b32 %r1, %r10;", {"%r10": np.arange(3, dtype=np.uint32)}, ["%r1"])
    with pytest.raises(RuntimeError, match="frob"):
        assemble([probe], "sm_80")
    with pytest.raises(PtxError, match="frob"):
        run_here(probe)


def test_titles_name_one_kernel_each():
    assert len({probe.name for probe in PROBES}) == len(BY_TITLE) == len(PROBES)


@pytest.mark.parametrize("title", BY_TITLE)
def test_results_depend_on_the_inputs_alone(title):
    """Not on who runs first, nor on where shared memory begins; races are reported as in kernels."""
    probe = BY_TITLE[title]
    first = run_here(probe)
    assert differences(probe, run_here(probe, seed=1, base=2048), first) == []
    assert not any((x == FILL).all() for x in first)


@pytest.mark.parametrize("title", [p.title for p in PROBES if p.block is None and "[" not in p.body])
def test_the_harness_gives_every_input_and_takes_every_result(title):
    """The same instruction with its inputs put into registers directly."""
    probe = BY_TITLE[title]
    registers = dict(zip(probe.inputs, inputs_of(probe), strict=True))
    out = snippet.run(probe.body, registers, threads=probe.programs * probe.threads)
    for name, got in zip(probe.results, run_here(probe), strict=True):
        assert np.array_equal(got, out[name][: probe.count].astype(got.dtype)), prefix(name)


def products() -> list[Probe]:
    return [probe for probe in PROBES if ".mma" in f".{probe.form}" or "mma_async" in probe.form]


@pytest.mark.parametrize("title", [probe.title for probe in products()])
def test_products_are_those_of_the_matrices(title):
    """The harness's images and fragments hold the matrices: the results are the elements of their product."""
    probe = BY_TITLE[title]
    got = np.stack([x.view(np.float32) for x in run_here(probe)[: len(probe.results)]])
    if probe.form.startswith("mma"):
        register, lane = np.indices(got.shape)  # 9.7.14.5.8: the figure of C and D
        row, column = lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2
        assert (got == (small(16, 16) @ small(16, 8))[row, column] + lane * 4 + register).all()
        return
    rows, columns = (64, 2 * len(probe.results)) if "mma_async" in probe.form else (int(title.split()[-2]), 32)
    assert sorted(got.reshape(-1)) == sorted((small(rows, 16) @ small(16, columns)).reshape(-1))


@pytest.mark.parametrize("title", BY_TITLE)
def test_a_wrong_result_is_reported(title):
    """Of a device that errs in one place: by one bit where bits count, by one unit too many where units do."""
    probe = BY_TITLE[title]
    want = run_here(probe)
    for number in range(len(want)):
        got = [x.copy() for x in want]
        if not probe.ulps:
            got[number][-1] ^= 1
            assert len(differences(probe, got, want)) == 1
            continue
        finite = np.flatnonzero((want[0] & 0x7F800000) % 0x7F800000 != 0)[0]
        got[0][finite] += probe.ulps
        assert differences(probe, got, want) == []
        got[0][finite] += 1
        (found,) = differences(probe, got, want)
        assert probe.form in found
        assert f"{int(want[0][finite]):#x}" in found


def test_units_in_the_last_place():
    one, nan, other = 0x3F800000, 0x7FFFFFFF, 0x7F800001
    x = np.array([one, one, 0, 1, nan, nan, nan, 0x7F800000], np.uint32)
    y = np.array([one, one + 3, 1 << 31, 1 << 31 | 1, nan, other, one, 0x7F7FFFFF], np.uint32)
    assert distance(x, y).tolist() == [0, 3, 1 << 32, 2, 0, 0, 1 << 32, 1]


def test_the_module_asks_for_its_target():
    text = module([BY_TITLE["add.s32"]], "sm_86")
    assert ".target sm_86" in text
    assert "add.s32 %r1, %r10, %r11;" in text
