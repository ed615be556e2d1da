"""Values and views that were taken in silence once, or refused in PyTorch's own words: refused by name, or right.

`VARIANTS` is the list of them by kind, with the op and the path of each: the kinds that were found, and the others of
each kind. Values are looked at on a CPU alone.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import orthorank_kernels as ok
from orthorank_kernels import dispatch
from orthorank_kernels.dispatch import BackendError, interpreting
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Sizes, calls, flat

ROOT = Path(__file__).resolve().parents[3]
SIZES = Sizes(batch=2, tokens=9, selected=4, hidden=8, heads=2, kv_heads=1, head_dim=4)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="values are looked at on a CPU alone")


def made() -> dict[str, Call]:
    return calls(Numbers(), SIZES)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def filled(value: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full_like(x, value)


def with_last(value: int) -> Callable[[Tensor], Tensor]:
    """The last number of a tensor changed."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[-1] = value
        return x

    return change


def paged(window: int | None = None, rows: bool = False) -> Call:
    call = made()["sparse_query_attention_paged, everything" if rows else "sparse_query_attention_paged"]
    return Call(call.op, call.args, {**call.options, "window": window})


TABLES = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(3))  # angles of nine tokens, two of a head
COS, SIN = TABLES.cos(), TABLES.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Call:
    return Call("apply_rotary_at", (x, cos, sin), options)


def both(x: Tensor) -> Tensor:
    """A table as Hugging Face has it."""
    return torch.cat([x, x], -1)


def beside(x: Tensor) -> Tensor:
    """A table as GPT-J and Cohere have it."""
    return x.repeat_interleave(2, -1)


X = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(4))
HALF = "cos has shape [1, 9, 2] and x a head_dim of 4; without rotary_dim"
TWICE = "and the second half of its last dimension does not repeat the first: each angle stands there twice"
PAST = "positions holds {}, and {} has {} tokens; each must be from 0 to"
PAGE = "block_table[{}, {}] is {}; sequence {} has keys there, so it must be a page of k_cache, from 0 to 1"
FALLS = "{} ends with {}; {} has {}"

# By kind, and then by what is wrong and where: the call, the error, and how its sentence begins.
VARIANTS: dict[str, dict[str, tuple[Callable[[], Call], type[Exception], str]]] = {
    "positions past the end": {
        name: (
            lambda name=name, place=place: made()[name].where(with_last(9), place),
            IndexError,
            PAST.format(9, of, 9),
        )
        for name, place, of in (
            ("gather_rows", 1, "x"),
            ("gather_rows, packed", 1, "x"),
            ("gather_add_rms_norm", 1, "hidden_states"),
            ("gather_add_rms_norm, packed", 1, "hidden_states"),
            ("scatter_rows_", 1, "out"),
            ("scatter_rows_, packed", 1, "out"),
            ("scatter_add_rows_", 1, "out"),
            ("scatter_add_rows_, packed", 1, "out"),
            ("apply_rotary_at", 3, "cos"),
            ("apply_rotary_at, interleaved", 3, "cos"),
            ("apply_rotary_at, packed", 3, "cos"),
        )
    },
    "a sequence past the end": {
        "rms_norm_score": (
            lambda: made()["rms_norm_score, packed, residual"].where(with_last(19), "cu_seqlens"),
            ValueError,
            FALLS.format("cu_seqlens", 19, "hidden_states", 18),
        ),
        "select_tokens": (
            lambda: made()["select_tokens, packed"].where(with_last(19), "cu_seqlens"),
            ValueError,
            FALLS.format("cu_seqlens", 19, "the token axis", 18),
        ),
        "add_low_rank": (
            lambda: made()["add_low_rank, packed"].where(with_last(19), "cu_seqlens"),
            ValueError,
            FALLS.format("cu_seqlens", 19, "the token axis", 18),
        ),
        "queries": (
            lambda: made()["sparse_query_attention_varlen"].where(with_last(9), 4),
            ValueError,
            FALLS.format("cu_selected", 9, "q", 8),
        ),
        "keys": (
            lambda: made()["sparse_query_attention_varlen"].where(with_last(19), 5),
            ValueError,
            FALLS.format("cu_seqlens_k", 19, "k", 18),
        ),
        "cached keys": (lambda: paged().where(with_last(17), 6), ValueError, "seq_lens[1] is 17; it must be from 0 to"),
        "a row of the table": (
            lambda: paged(rows=True).where(with_last(2), "table_rows"),
            ValueError,
            "table_rows[1] is 2; block_table has rows 0 to 1",
        ),
        "k": (lambda: Call("select_tokens", (torch.zeros(1, 4), 5), {}), ValueError, "k is 5; it must be from 0 to"),
    },
    "pages that are not there": {
        "past the end": (lambda: paged().where(with_last(2), 5), IndexError, PAGE.format(1, 0, 2, 1)),
        "below 0": (lambda: paged().where(with_last(-1), 5), IndexError, PAGE.format(1, 0, -1, 1)),
        "with a window": (lambda: paged(window=3).where(filled(9), 5), IndexError, PAGE.format(0, 0, 9, 0)),
        "by table_rows": (
            lambda: paged(rows=True).where(with_last(2**31 - 1), 5).where(lambda x: x.flip(0), "table_rows"),
            IndexError,
            PAGE.format(1, 0, 2**31 - 1, 0),
        ),
        "float8": (
            lambda: made()["sparse_query_attention_paged, float8"].where(filled(2), 5),
            IndexError,
            PAGE.format(0, 0, 2, 0),
        ),
    },
    "a workspace that is not zero": {
        name: (lambda name=name: made()[name].where(with_last(1), "workspace"), ValueError, "workspace holds numbers")
        for name in ("rms_norm_select", "rms_norm_select, packed", "rms_norm_select, packed, threshold")
    },
    "rotary tables that do not fit": {
        "half the width": (lambda: rotary(X, COS, SIN), ValueError, HALF),
        "half the width, interleaved": (lambda: rotary(X, COS, SIN, interleaved=True), ValueError, HALF),
        "half the width, packed": (
            lambda: rotary(X[0].transpose(0, 1), COS[0], SIN[0]),
            ValueError,
            "cos has shape [9, 2] and x a head_dim of 4; without rotary_dim",
        ),
        "half the width, positions": (
            lambda: rotary(X, COS, SIN, positions=ints(*range(9))[None]),
            ValueError,
            HALF,
        ),
        "of another head_dim": (
            lambda: rotary(X, both(both(COS)), both(both(SIN))),
            ValueError,
            "cos has shape [1, 9, 8] and x a head_dim of 4; without rotary_dim",
        ),
        "neither rotary_dim nor half": (
            lambda: rotary(both(X), both(COS)[..., :3], both(SIN)[..., :3], rotary_dim=4),
            ValueError,
            "rotary_dim is 4 and cos has shape [1, 9, 3]",
        ),
        "wider than rotary_dim": (
            lambda: rotary(both(X), both(both(COS)), both(both(SIN)), rotary_dim=4),
            ValueError,
            "rotary_dim is 4 and cos has shape [1, 9, 8]",
        ),
        "each angle beside itself": (
            lambda: rotary(X, beside(COS), beside(SIN), interleaved=True),
            ValueError,
            f"cos has shape [1, 9, 4], {TWICE}",
        ),
        "the sines beside themselves": (
            lambda: rotary(X, both(COS), beside(SIN)),
            ValueError,
            f"sin has shape [1, 9, 4], {TWICE}",
        ),
        "sin of another width": (
            lambda: rotary(X, both(COS), SIN),
            ValueError,
            "sin has shape [1, 9, 2]; the shape of cos",
        ),
    },
}
REFUSED = [(kind, name) for kind, variants in VARIANTS.items() for name in variants]


@pytest.mark.parametrize(("kind", "name"), REFUSED, ids=lambda value: value)
def test_it_is_refused_by_name_and_nothing_is_written(kind: str, name: str) -> None:
    make, error, sentence = VARIANTS[kind][name]
    call = make()
    before = {at: x.clone() for at, x in call.tensors().items()}
    for backend in ("auto", "torch", *(["triton"] if interpreting() else [])):
        with pytest.raises(error) as caught:
            call(backend=backend)
        assert str(caught.value).startswith(sentence)
        for at, x in call.tensors().items():
            assert torch.equal(x.float(), before[at].float()), "something was written"


def test_table_widths_that_are_said_are_right() -> None:
    whole = ok.apply_rotary_at(X, both(COS), both(SIN))
    assert torch.equal(ok.apply_rotary_at(X, COS, SIN, rotary_dim=4), whole)
    assert torch.equal(ok.apply_rotary_at(X, both(COS[..., :1]), both(SIN[..., :1]), rotary_dim=2)[..., 2:], X[..., 2:])
    pairs = ok.apply_rotary_at(X, COS, SIN, rotary_dim=4, interleaved=True)
    assert torch.equal(
        ok.apply_rotary_at(X, beside(COS)[..., ::2].contiguous(), SIN, rotary_dim=4, interleaved=True), pairs
    )
    wide = torch.cat([X, X + 1], -1)  # of 8, of which the first 4 are rotated
    expected = torch.cat([whole, X + 1], -1)
    assert torch.equal(ok.apply_rotary_at(wide, both(COS), both(SIN), rotary_dim=4), expected)
    assert torch.equal(ok.apply_rotary_at(wide, COS, SIN, rotary_dim=4), expected)


def test_positions_past_the_keys_see_all_of_them() -> None:
    """Attention is causal, so a position past the last key is no index: it is right as it is."""
    call = made()["sparse_query_attention"]
    assert torch.equal(call.where(filled(99), 3)(), call.where(filled(8), 3)())
    packed = made()["sparse_query_attention_varlen"]
    assert torch.equal(packed.where(filled(99), 3)(), packed.where(filled(8), 3)())


def test_table_entries_that_no_query_looks_up_may_be_anything() -> None:
    new, page = Numbers(seed=1), 2
    q, (k, v) = new.floats(2, 2, 4), (new.floats(3, page, 1, 4) for _ in range(2))
    positions, cu_selected, seq_lens = ints(3, 4), ints(0, 2, 2), ints(5, 4)

    def attended(table: list[int], window: int | None, rows: Tensor | None = None) -> Tensor:
        tables = torch.tensor([table, [7, 7, 7, 7]], dtype=torch.int32)  # the second sequence has no query
        options: dict[str, Any] = {"window": window, "table_rows": rows}
        return ok.sparse_query_attention_paged(q, k, v, positions, cu_selected, tables, seq_lens, **options)

    assert torch.equal(attended([0, 1, 2, -9], None), attended([0, 1, 2, 2], None))
    assert torch.equal(attended([-9, 1, 2, -9], 2), attended([0, 1, 2, 2], 2))  # before the window of the first query
    assert torch.equal(attended([0, 1, 2, 99], None, ints(0, 99)), attended([0, 1, 2, 2], None))
    with pytest.raises(IndexError, match=r"block_table\[0, 0\] is -9; sequence 0"):
        attended([-9, 1, 2, 2], 4)


def negated(x: Tensor) -> Tensor:
    """The same values in a view with the negative bit, as PyTorch makes of the imaginary part of a conjugate."""
    return torch._neg_view((-x.float()).to(x.dtype))


@pytest.mark.parametrize("name", made())
def test_views_with_the_negative_bit_are_read_right_or_refused_by_name(name: str) -> None:
    for at, x in made()[name].tensors().items():
        if not x.is_floating_point() or x.element_size() == 1:  # PyTorch negates no float8
            continue
        for backend in ("auto", "torch", "triton") if interpreting() else ("auto", "torch"):
            plain, call = made()[name], made()[name].where(negated, at)
            assert call.tensors()[at].is_neg()
            if backend == "triton" or at in range(IN_PLACE.get(call.op, 0)):
                with pytest.raises(BackendError, match=r"^\w+ is a view whose values are negated.*\.resolve_neg\(\)"):
                    call(backend=backend)
                continue
            for got, expected in zip(flat(call(backend=backend)), flat(plain(backend=backend)), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # a copy may be summed in another order


@pytest.mark.parametrize("name", [name for name, call in made().items() if call.op not in IN_PLACE])
def test_outputs_with_the_negative_bit_are_refused_by_name(name: str) -> None:
    result = made()[name]()
    out = (
        torch._neg_view(torch.empty_like(result))
        if isinstance(result, Tensor)
        else tuple(None if x is None or x.numel() == 0 else torch._neg_view(torch.empty_like(x)) for x in result)
    )
    with pytest.raises(BackendError, match=r"^out(\[\d\])? is a view whose values are negated .*\.copy_\(\)"):
        made()[name](out=out)


def leaf_of(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


# What a scatter may not write to: how it is made of a tensor, and the error.
UNWRITABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a leaf": (leaf_of, "out is a leaf that requires grad, or a view of one, and PyTorch lets nothing write to it"),
    "a parameter": (lambda x: torch.nn.Parameter(x.clone()), "out is a leaf that requires grad"),
    "a view of a leaf": (lambda x: leaf_of(x)[..., 1:, :], "out is a leaf that requires grad, or a view of one"),
    "one of an unbound tensor": (
        lambda x: (leaf_of(torch.stack([x, x])) * 1).unbind(0)[1],
        "out is a view of a kind that autograd does not follow",
    ),
    "made in inference mode": (lambda x: in_inference_mode(x), "out was made under torch.inference_mode()"),
}


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("what", UNWRITABLE)
@pytest.mark.parametrize("name", [name for name, call in made().items() if call.op.startswith("scatter")])
def test_what_autograd_does_not_let_be_written_is_refused_by_name(name: str, what: str) -> None:
    make, sentence = UNWRITABLE[what]
    call = made()[name].where(filled(1), 1)
    tokens = torch.cat([call.args[0][..., :1, :], call.args[0]], -2)  # one more: a view may leave it out
    out = make(tokens)
    before = out.detach().clone()
    for backend in ("auto", "torch"):
        with pytest.raises(BackendError) as caught:
            call.where(lambda _: out, 0)(backend=backend)
        assert str(caught.value).startswith(sentence)
        assert torch.equal(out, before)
    inside = torch.inference_mode if out.is_inference() else torch.no_grad
    with inside():
        call.where(lambda _: out, 0)()
    assert not torch.equal(out.detach(), before)


def test_the_gradient_of_what_was_computed_from_a_leaf_is_right() -> None:
    call = made()["scatter_rows_"]
    leaf, rows = call.args[0].clone().requires_grad_(), call.args[2].clone().requires_grad_()
    out = leaf * 1
    ok.scatter_rows_(out, call.args[1], rows)
    out.sum().backward()
    written = torch.zeros(2, 9).scatter_(1, call.args[1].long(), 1.0)
    assert torch.equal(leaf.grad, (1 - written)[..., None].expand_as(leaf))
    assert torch.equal(rows.grad, torch.ones_like(rows))


UNREPAIRED = """
import torch
import orthorank_kernels as ok
from orthorank_kernels.dispatch import BackendError
from tests.orthorank_kernels.every_op import Numbers, Sizes, calls, flat

def tried(dtype):
    sizes = Sizes(batch=2, tokens=9, selected=4, hidden=8, heads=2, kv_heads=1, head_dim=4, dtype=dtype)
    for name, call in calls(Numbers(), sizes).items():
        holds = any(x.dtype == torch.bfloat16 for x in call.tensors().values())
        try:
            call(backend="triton")
        except BackendError as error:
            assert holds and "has dtype bfloat16, which Triton's interpreter" in str(error), (name, str(error))
            assert str(error).split()[0] in {"x", "hidden_states", "q", "out", "gate", "k_cache"}, str(error)
        else:
            assert not holds, name
        if holds:
            for x in flat(call()):
                assert not x.is_floating_point() or x.float().isfinite().all()

tried(torch.bfloat16)
try:
    ok.warmup(dtype=torch.bfloat16, hidden=8, heads=1, kv_heads=1, head_dim=8, tokens=[4], device="cpu")
except BackendError as error:
    print(error)
"""


@pytest.mark.skipif(not interpreting(), reason="of Triton's interpreter")
def test_bfloat16_in_an_interpreter_that_takes_it_for_integers() -> None:
    """Refused for every op, and by a path that calls them; `interpreter.py` repairs it in the other tests."""
    assert dispatch._interprets_bfloat16()
    done = subprocess.run([sys.executable, "-c", UNREPAIRED], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "has dtype bfloat16, which Triton's interpreter (TRITON_INTERPRET=1) takes for integers" in done.stdout


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paged_layer", ROOT / "examples" / "paged_layer.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Of a whole packed layer, over vLLM's views of its cache: the field of the step that is wrong, and the error.
STEPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a page that is not there": ({"block_table": with_last(2)}, IndexError, "block_table[1, 0] is 2; sequence 1"),
    "tables of half the width": (
        {"cos": lambda x: x[:, :2], "sin": lambda x: x[:, :2]},
        ValueError,
        "cos has shape [18, 2] and keys a head_dim of 4; without rotary_dim",
    ),
    "a sequence past the end": ({"cu_seqlens": with_last(19)}, ValueError, "cu_seqlens ends with 19"),
}


@pytest.mark.parametrize("what", STEPS)
def test_a_packed_layer_over_vllm_s_views(example: ModuleType, what: str) -> None:
    new, changes, error, sentence = Numbers(seed=2), *STEPS[what]
    shapes = {"input_norm": (8,), "q": (8, 8), "kv": (8, 8), "o": (8, 8), "pre_mlp_norm": (8,), "gate_up": (32, 8)}
    weights = example.Weights(**{name: new.floats(*shape) for name, shape in shapes.items()}, down=new.floats(8, 16))
    step = {
        "cu_seqlens": ints(0, 9, 18),
        "cached": ints(0, 0),
        "seq_lens": ints(9, 9),
        "k": ints(3, 3),
        "slots": torch.cat([torch.arange(9), 16 + torch.arange(9)]),
        "block_table": ints(0, 1).view(2, 1),
        "cos": both(TABLES.cos()[0]).repeat(2, 1),
        "sin": both(TABLES.sin()[0]).repeat(2, 1),
    }
    hidden, sink = new.floats(18, 8), new.floats(8)

    def run(step: dict[str, Any]) -> Tensor:
        k_cache, v_cache = torch.zeros(2, 1, 16, 8).transpose(1, 2).split(4, -1)
        states = hidden.clone()
        example.selected_layer(states, sink, k_cache, v_cache, weights, example.Step(**step, selected=6, longest=9))
        return states

    assert (run(step) != hidden).any(-1).sum() == 6
    with pytest.raises(error) as caught:
        run({name: changes[name](x) if name in changes else x for name, x in step.items()})
    assert str(caught.value).startswith(sentence)
