"""The operators: registered once in a process, however often the modules are imported."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orthorank_kernels
from orthorank_kernels.support import OPS

ROOT = Path(__file__).resolve().parents[3]

AGAIN = """
import importlib, sys
import torch
import orthorank_kernels as first
from orthorank_kernels import op as _library
from orthorank_kernels.ops import rows

x, positions = torch.arange(12.0).reshape(1, 6, 2), torch.tensor([[1, 4]], dtype=torch.int32)
expected = first.gather_rows(x, positions)
old = first.gather_rows

def check(gather):
    assert torch.equal(gather(x, positions), expected)
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, positions), expected)

for module in (first, rows, _library, rows):
    importlib.reload(module)
    check(old)
    check(rows.gather_rows)

for name in [n for n in sys.modules if n.split(".")[0] == "orthorank_kernels"]:
    del sys.modules[name]
second = importlib.import_module("orthorank_kernels")
assert second is not first and second.gather_rows is not old
check(second.gather_rows)
check(old)

"""

EDITED = """
import torch
from orthorank_kernels import op as _library

def define(added):
    def edited(x: torch.Tensor) -> torch.Tensor:
        return x + added

    fake = lambda call: torch.empty_like(call.x)
    return _library.define(edited, reference=edited, triton="rows.gather_rows", fake=fake)

x = torch.ones(2)
first = define(1)
assert first.functional(x).tolist() == [2, 2]
second = define(2)
assert first.functional(x).tolist() == second.functional(x).tolist() == [3, 3], "what was edited counts"
def edited(x: torch.Tensor, n: int) -> torch.Tensor:
    return x + n

try:
    _library.define(edited, reference=edited, triton="")
except RuntimeError as error:
    assert "edited is registered with another schema" in str(error) and "restart Python" in str(error), error
else:
    raise AssertionError("another schema was taken")
"""


def run(code: str) -> None:
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_importing_again_is_harmless() -> None:
    run(AGAIN)


def test_an_edited_implementation_counts_and_another_schema_is_refused() -> None:
    run(EDITED)


def test_an_operator_knows_its_arguments_without_asking_its_schema() -> None:
    """They are asked for at every call, and walking a schema takes longer than the checks."""
    from orthorank_kernels import op as _library
    from orthorank_kernels.ops import rows

    operators = {name: op for name, op in vars(rows).items() if isinstance(op, _library.Operator)}
    assert len(operators) == 3
    for op in operators.values():
        schema = op.functional._schema.arguments
        assert op.arguments == tuple(argument.name for argument in schema)
        assert op.written == tuple(i for i, argument in enumerate(schema) if argument.is_write)
        assert {"arguments", "written"} <= set(vars(op))
    assert sum(bool(op.written) for op in operators.values()) == 2


# What a public function resolves before the operator sees it: its own parameters, and those it makes of them.
RESOLVED = {
    "rms_norm_score": ({"lengths"}, set()),  # scores of padding mean nothing
    "select_tokens": ({"max_selected"}, {"seq_k", "seq_threshold", "width"}),
    "rms_norm_select": ({"max_selected"}, {"seq_k", "seq_threshold", "width"}),
}


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_public_signature_is_the_schema(name: str) -> None:
    public = inspect.signature(getattr(orthorank_kernels, name)).parameters
    schema = {a.name: a for a in getattr(torch.ops.orthorank_kernels, name).default._schema.arguments}
    own, made = RESOLVED.get(name, (set(), set()))
    written = {argument for argument in schema if schema[argument].is_write}
    assert set(public) - {"backend", "out"} - own - written == set(schema) - made - written
    for argument in set(public) & set(schema):
        default = public[argument].default
        if schema[argument].has_default_value():
            assert schema[argument].default_value == default
            assert type(schema[argument].default_value) is type(default)


@pytest.mark.parametrize("name", ["rms_norm_score", "rms_norm_score_out"])
def test_a_launcher_gets_the_defaults_that_pytorch_leaves_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orthorank_kernels import op as _library

    seen = []
    monkeypatch.setattr(_library, "launcher", lambda path: lambda *args, **out: seen.append((path, args)))
    _library._registered().implementations[name]["cuda"](1, 2, 1e-5, None, "layer")
    rest = (None, 0.0, "inner", None, None, None, True, False)
    assert seen == [("scoring.rms_norm_score", (1, 2, 1e-5, None, "layer", *rest))]
