"""The table of what is not covered is true: real instructions, which the interpreter refuses and no kernel has."""

import subprocess

import pytest

from ptx_check import snippet
from ptx_check.errors import UnknownInstruction
from tests.ptx import emitted
from tests.ptx.uncovered import UNCOVERED

pytest.importorskip("triton")
MODULE = """.version 8.6
.target {target}
.address_size 64
.func helper() {{ ret; }}
.visible .entry uncovered() .reqntid 128
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<9>; .reg .f64 %fd<9>;
    {text}
    ret;
}}
"""


def form(text: str) -> str:
    return text.split()[0].rstrip(";")


@pytest.mark.parametrize("text", [one.text for one in UNCOVERED])
def test_it_is_refused_by_name(text):
    with pytest.raises(UnknownInstruction) as raised:
        snippet.run(text)
    assert form(text) in str(raised.value)


@pytest.mark.parametrize(("text", "target", "reason"), UNCOVERED)
def test_it_is_an_instruction(text, target, reason, tmp_path):
    """The assembler takes it: what is listed could be emitted."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = tmp_path / "uncovered.ptx"
    source.write_text(MODULE.format(target=target, text=text), encoding="utf-8")
    number = int("".join(c for c in target if c.isdigit()))
    command = [get_ptxas(number).path, f"--gpu-name={target}", str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_kernel_has_it():
    assert not {form(one.text) for one in UNCOVERED} & set(emitted.read())
    assert all(one.reason for one in UNCOVERED)
