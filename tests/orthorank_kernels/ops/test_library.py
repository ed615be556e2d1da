"""The operators: registered once in a process, however often the modules are imported."""

import subprocess
import sys
from pathlib import Path

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

def define(compute):
    return _library.define(
        "edited(Tensor x) -> Tensor",
        reference=compute,
        pytorch=compute,
        triton="rows.gather_rows",
        fake=lambda x: torch.empty_like(x),
    )

x = torch.ones(2)
first = define(lambda x: x + 1)
assert first.functional(x).tolist() == [2, 2]
second = define(lambda x: x + 2)
assert first.functional(x).tolist() == second.functional(x).tolist() == [3, 3], "what was edited counts"
try:
    _library.define("edited(Tensor x, int n) -> Tensor", reference=None, pytorch=None, triton="", fake=None)
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
