"""Kernels that this package was not written for, as Triton 3.9 compiles them: see `tutorials`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ptx_check import Program, PtxError, Race, Uninitialised, check, mutate

FOLDER = Path(__file__).with_name("ptx_files")
README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
RANDOM = np.random.default_rng(0)


def of(name: str) -> tuple[str, int]:
    ptx = (FOLDER / f"{name}.ptx").read_text(encoding="utf-8")
    return ptx, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["shared"]


def softmax(program: str | Program, shared: int, seeds: tuple[int | None, ...] = (1,)) -> None:
    """7 rows of 200 columns for 3 programs: the last has one row less, and a part of each row is masked."""
    x = RANDOM.standard_normal((7, 200)).astype(np.float32)
    out = np.full_like(x, np.nan)
    check(program, (3,), [out, x, 200, 200, 7, 200], shared_bytes=shared, seeds=seeds)
    powers = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(out, powers / powers.sum(1, keepdims=True), rtol=1e-5)


def matmul(program: str | Program, shared: int, seeds: tuple[int | None, ...] = (1,), tile: int = 32) -> None:
    """[72, 80] times [80, 48]: no side is a multiple of its tile."""
    a, b = (RANDOM.standard_normal(shape).astype(np.float16) for shape in ((72, 80), (80, 48)))
    c = np.full((72, 48), np.nan, np.float16)
    grid = (-(-72 // tile) * 2,)
    check(program, grid, [a, b, c, 72, 48, 80, 80, 48, 48], shared_bytes=shared, seeds=seeds)
    product = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c, np.where(product >= 0, product, product / 100), rtol=2e-3, atol=1e-4)


def run_of(name: str):
    return softmax if name.startswith("softmax") else lambda *a: matmul(*a, tile=64 if name.endswith("90") else 32)


@pytest.mark.parametrize(
    ("name", "seeds"), [("softmax_sm80", (None, 1, 2)), ("matmul_sm80", (None,)), ("matmul_sm90", (1,))]
)
def test_it_computes_what_it_should(name, seeds):
    run_of(name)(*of(name), seeds)


BARRIER = "\tbar.sync \t0;\n"


@pytest.mark.parametrize(
    ("name", "missed"),
    [("softmax_sm80", 4), ("matmul_sm80", 5), pytest.param("matmul_sm90", 4, marks=pytest.mark.slow)],
)
def test_a_missing_barrier_is_found(name, missed):
    """Each is struck out of the text in turn. Two are not needed: the softmax's last, after which nothing is read, and
    in the product for sm_80 one that another follows."""
    ptx, shared = of(name)
    pieces, found = ptx.split(BARRIER), []
    for at in range(1, len(pieces)):
        planted = BARRIER.join(pieces[:at]) + BARRIER.join(pieces[at:])
        try:
            run_of(name)(planted, shared)
        except (Race, Uninitialised) as error:
            found.append(str(error))
    assert len(found) == missed
    assert len(pieces) - 1 - missed == (name[-2:] == "80")
    assert any("no barrier lies between" in text for text in found)
    assert all("tutorials.py:" in text for text in found)


def test_the_readme_shows_what_is_said():
    ptx, shared = of("softmax_sm80")
    first, second, *rest = ptx.split(BARRIER)
    with pytest.raises(Race) as raised:
        softmax(first + BARRIER + second + BARRIER.join(rest), shared, (None,))
    assert " ".join(f"Race: {raised.value}".split()) in " ".join(README.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "noticed", "redundant", "not_noticed"),
    [("softmax_sm80", 6, 0, 2), ("matmul_sm80", 8, 1, 3), ("matmul_sm90", 12, 0, 0)],
)
def test_which_instructions_are_noticed_when_they_are_gone(name, noticed, redundant, not_noticed):
    """For sm_80 Triton ends the softmax with a wait and a barrier after which nothing is read, and begins the product
    with some that others follow."""
    ptx, shared = of(name)
    found = list(mutate(ptx, lambda program: run_of(name)(program, shared)))
    count = [sum(m.noticed == how for m in found) for how in ("error", "redundant", "")]
    assert count == [noticed, redundant, not_noticed]


def test_a_bound_that_is_missing_is_found():
    ptx, shared = of("matmul_sm80")
    assert ptx.count("@%p15 st.global") == 1
    with pytest.raises(PtxError, match="argument 2"):
        matmul(ptx.replace("@%p15 st.global", "st.global"), shared)


def in_a_process(code: str) -> str:
    """What the code prints where Triton compiles instead of interpreting."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.9"):
        pytest.skip(f"the files are Triton 3.9's and this is {triton.__version__}")
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{here.parent / 'src'}"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout


@pytest.mark.slow
def test_the_files_are_what_the_compiler_makes():
    made = json.loads(
        in_a_process(
            "import tutorials, json; print(json.dumps({name: tutorials.compiled(name) for name in tutorials.KERNELS}))"
        )
    )
    assert {name: tuple(value) for name, value in made.items()} == {name: of(name) for name in made}


@pytest.mark.slow
def test_the_example_of_the_readme():
    code = README.split("```python\n")[1].split("```")[0].replace("your_kernels", "tutorials")
    printed = in_a_process(f"{code}\nimport sys; print('torch' in sys.modules, np.isfinite(out).all())")
    assert printed.split() == ["False", "True"]
