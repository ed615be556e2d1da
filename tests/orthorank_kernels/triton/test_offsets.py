"""Offsets are 64 bits wide by rule: a 32-bit product of an index and a stride is the field's most repeated bug.

Read from the source of every kernel: each `tl.program_id` becomes int64 where it is called, and whatever is multiplied
by a stride or by a size of a tensor is int64. Exceptions stand below, with their reasons. Sums are not read: an index
within one row or one tile is 32 bits wide everywhere, and `test_extents_past_32_bits_on_a_gpu` runs one launch beyond.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[3] / "orthorank_kernels" / "triton"

# Functions whose program ids stay 32 bits wide.
_ATTENTION = (
    "64-bit indices across the key loop cost 40 registers on sm_80; the numbers of a tile and of a head are small, and "
    "whatever meets a stride is widened there"
)
NARROW_PROGRAM_IDS = {"sparse_query_attention_kernel": _ATTENTION, "hopper_attention_kernel": _ATTENTION}
# Functions that multiply 32 bits.
_KEYS = "64-bit offsets of keys cost 40 registers; the launcher sets WIDE where keys * stride exceeds 32 bits"
_BLOCK = "rows of one block; where the block begins is 64 bits wide"
NARROW_PRODUCTS = {
    "load_rows": _KEYS,
    "load_paged_rows": _KEYS.replace("keys * stride", "a page"),
    "_rows_of_values": _BLOCK,
    "fill_first_values": _BLOCK,
}
# Besides strides, what an index is multiplied by: the sizes of tensors, and the tokens that a program takes.
SIZES = {
    "n_tokens",
    "selected",
    "keys",
    "width",
    "rows",
    "tokens_each",
    "rows_per_program",
    "HIDDEN",
    "HEAD_DIM",
    "STRIDE",
}
# Parameters that are int64 by contract; the test checks what callers pass.
WIDE_PARAMETERS = {
    "norm_and_score": {"seq", "first", "end", "sink_token"},
    "bounds": {"seq", "end"},
    "select_in_batch": {"seq"},
    "select_sequence": {"seq"},
}
# Functions that return int64 only; the test checks what they return.
WIDE_RESULTS = {"first_piece", "bounds"}


def is_jit(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(word in ast.unparse(d) for d in decorators for word in ("triton.jit", "gluon.jit"))


def jit_functions() -> list[ast.FunctionDef]:
    """Those of Gluon with ``tl`` for its ``gl``, which are alike here."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(KERNELS.rglob("*.py")))
    trees = [ast.parse(re.sub(r"\bgl\.", "tl.", text)) for text in texts]
    return [node for tree in trees for node in ast.walk(tree) if is_jit(node)]


FUNCTIONS = {f.name: f for f in jit_functions()}


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name)


def widened(tree: ast.AST) -> set[ast.AST]:
    """Expressions e of ``e.to(tl.int64)``."""
    return {
        n.func.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == "to"
        and [ast.unparse(a) for a in n.args] == ["tl.int64"]
    }


def is_wide(expression: ast.AST, wide_names: set[str]) -> bool:
    """Whether some term of an arithmetic expression is int64, so that the whole is."""
    if isinstance(expression, ast.Name):
        return expression.id in wide_names
    if isinstance(expression, ast.BinOp):
        return is_wide(expression.left, wide_names) or is_wide(expression.right, wide_names)
    if isinstance(expression, ast.Subscript):
        return is_wide(expression.value, wide_names)
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) in ("tl.minimum", "tl.maximum"):
        return any(is_wide(a, wide_names) for a in expression.args)
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "tl.cast":
        return ast.unparse(expression.args[1]) == "tl.int64"
    if isinstance(expression, ast.Call) and ast.unparse(expression.func) in WIDE_RESULTS:
        return True
    return isinstance(expression, ast.Call) and bool(widened(expression) & {getattr(expression.func, "value", None)})


def wide_names(function: ast.FunctionDef) -> set[str]:
    """Names that only ever hold int64: parameters by contract, results of wide expressions, loops over wide ranges."""
    names = set(WIDE_PARAMETERS.get(function.name, ()))
    narrow = {argument.arg for argument in function.args.args} - names
    for node in ast.walk(function):  # in the order of the source, outer statements first
        if isinstance(node, ast.Assign):
            found = {target.id for target in ast.walk(node.targets[0]) if is_assigned(target)}
            (names if is_wide(node.value, names) else narrow).update(found)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call):
            (names if any(is_wide(a, names) for a in node.iter.args) else narrow).add(node.target.id)
    return names - narrow


def is_assigned(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def is_extent(factor: ast.AST) -> bool:
    return isinstance(factor, ast.Name) and (factor.id.lower().startswith("stride_") or factor.id in SIZES)


def extent_products(function: ast.FunctionDef) -> Iterator[tuple[ast.BinOp, ast.AST]]:
    """Each product with a stride or a size, and its other factor."""
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if is_extent(one):
                    yield node, other


def narrow_products(function: ast.FunctionDef) -> list[str]:
    names = wide_names(function)
    return [
        f"line {p.lineno}: {ast.unparse(p)}" for p, factor in extent_products(function) if not is_wide(factor, names)
    ]


def narrow_program_ids(function: ast.FunctionDef) -> list[str]:
    wide = widened(function)
    return [f"line {c.lineno}: {ast.unparse(c)}" for c in calls(function, "tl.program_id") if c not in wide]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_program_ids_are_widened_where_they_are_read(name):
    if name in NARROW_PROGRAM_IDS:
        assert narrow_program_ids(FUNCTIONS[name]), "the exception is no longer needed: take it off the list"
    else:
        assert not narrow_program_ids(FUNCTIONS[name]), "write tl.program_id(...).to(tl.int64)"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_meets_a_stride_or_a_size_is_64_bits_wide(name):
    if name in NARROW_PRODUCTS:
        assert narrow_products(FUNCTIONS[name]), "the exception is no longer needed: take it off the list"
    else:
        assert not narrow_products(FUNCTIONS[name]), "widen the index with .to(tl.int64) before the product"


@pytest.mark.parametrize("name", WIDE_PARAMETERS)
def test_callers_pass_64_bits_where_the_contract_says_so(name):
    sites = [(f, call) for f in FUNCTIONS.values() for call in calls(f, name)]
    assert sites
    for function, call in sites:
        passed = {k.arg: k.value for k in call.keywords}
        for parameter in WIDE_PARAMETERS[name]:
            assert is_wide(passed[parameter], wide_names(function)), f"{function.name} passes a narrow {parameter}"


@pytest.mark.parametrize("name", sorted(WIDE_RESULTS))
def test_functions_return_64_bits_where_the_contract_says_so(name):
    function = FUNCTIONS[name]
    (returned,) = (n.value for n in ast.walk(function) if isinstance(n, ast.Return))
    for value in returned.elts if isinstance(returned, ast.Tuple) else [returned]:
        assert is_wide(value, wide_names(function)), f"{name} returns a narrow {ast.unparse(value)}"


def test_exceptions_name_functions_that_exist():
    assert set(NARROW_PROGRAM_IDS) | set(NARROW_PRODUCTS) | set(WIDE_PARAMETERS) | WIDE_RESULTS <= set(FUNCTIONS)
    assert all(NARROW_PROGRAM_IDS.values())
    assert {node.id for f in FUNCTIONS.values() for node in ast.walk(f) if isinstance(node, ast.Name)} >= SIZES


def example(body: str) -> ast.FunctionDef:
    function = ast.parse(f"@triton.jit\ndef kernel(x_ptr, stride_x, n):\n{body}").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


@pytest.mark.parametrize(
    ("body", "ids", "products"),
    [
        (" row = tl.program_id(0)\n x_ptr += row * stride_x", 1, 1),
        (" row = tl.program_id(0).to(tl.int64)\n x_ptr += row * stride_x", 0, 0),
        (" row = tl.program_id(0)\n x_ptr += row.to(tl.int64) * stride_x", 1, 0),
        (" row = tl.load(x_ptr)\n x_ptr += stride_x * row", 0, 1),
        (" row = tl.load(x_ptr).to(tl.int64)\n x_ptr += (row + 1) * stride_x", 0, 0),
        (" for row in range(0, n):\n  x_ptr += row * stride_x", 0, 1),
        (" row = tl.load(x_ptr).to(tl.int64)\n row = 1\n x_ptr += row * stride_x", 0, 1),
        (" row = tl.load(x_ptr)\n x_ptr += row * width", 0, 1),
        (" row = tl.load(x_ptr)\n x_ptr += (row * HIDDEN) * STRIDE_X", 0, 2),
        (" if WIDE:\n  n = n.to(tl.int64)\n x_ptr += n[:, None] * STRIDE", 0, 1),
    ],
)
def test_the_reader_itself(body, ids, products):
    assert len(narrow_program_ids(example(body))) == ids
    assert len(narrow_products(example(body))) == products
