"""The argument checks that the public ops share: what passes, what they say, that a compiler reads them."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import orthorank_kernels as ok
from orthorank_kernels import checks as _checks
from orthorank_kernels.dispatch import BackendError
from tests.orthorank_kernels.every_op import NOT_OPS, Numbers, calls


@pytest.mark.parametrize(
    ("value", "limits", "error", "sentence"),
    [
        (1e-6, {"above": 0}, None, ""),
        (1, {"above": 0}, None, ""),
        (0.0, {"at_least": 0}, None, ""),
        (None, {"none": "the default"}, None, ""),
        ("a", {"above": 0}, TypeError, "eps is 'a'; it must be a number above 0"),
        (True, {}, TypeError, "eps is True; it must be a number"),
        (torch.ones(2), {}, TypeError, "eps is a tensor [2]; it must be a number"),
        (None, {}, TypeError, "eps is None; it must be a number"),
        ([], {"none": "x"}, TypeError, "eps is []; it must be a number, or None for x"),
        (0, {"above": 0, "because": "or a row of zeros has no norm"}, ValueError,
         "eps is 0; it must be a number above 0, or a row of zeros has no norm"),
        (-1.5, {"at_least": 0}, ValueError, "eps is -1.5; it must be a number of at least 0"),
        (float("nan"), {}, ValueError, "eps is nan; it must be a finite number"),
        (float("nan"), {"above": 0}, ValueError, "eps is nan; it must be a number above 0"),
        (float("inf"), {"above": 0}, ValueError, "eps is inf; it must be a finite number above 0"),
    ],
)  # fmt: skip
def test_numbers(value: object, limits: dict, error: type[Exception] | None, sentence: str) -> None:
    if error is None:
        _checks.number("eps", value, **limits)
        return
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        _checks.number("eps", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "error", "sentence"),
    [
        (3, {"at_least": 1, "at_most": 3}, None, ""),
        (None, {"at_least": 1, "none": "no window"}, None, ""),
        (1.5, {"at_least": 0, "at_most": 8}, TypeError, "window is 1.5; it must be an int from 0 to 8"),
        (False, {"at_least": 1}, TypeError, "window is False; it must be an int of at least 1"),
        ("4", {}, TypeError, "window is '4'; it must be an int"),
        (torch.tensor(4), {}, TypeError, "window is a tensor []; it must be an int"),
        (0, {"at_least": 1, "none": "no window", "because": "a query sees itself"}, ValueError,
         "window is 0; it must be an int of at least 1, or None for no window, a query sees itself"),
        (9, {"at_most": 8}, ValueError, "window is 9; it must be an int of at most 8"),
    ],
)  # fmt: skip
def test_integers(value: object, limits: dict, error: type[Exception] | None, sentence: str) -> None:
    if error is None:
        _checks.integer("window", value, **limits)
        return
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        _checks.integer("window", value, **limits)


def test_flags_and_words() -> None:
    _checks.flag("write_norm", True)
    with pytest.raises(TypeError, match="write_norm is 1; it must be True or False"):
        _checks.flag("write_norm", 1)
    _checks.choice("norm", "rms", ("rms", "layer"))
    for wrong in ("Rms", None, 3, ["rms"]):
        with pytest.raises(ValueError, match="it may be one of 'rms', 'layer'"):
            _checks.choice("norm", wrong, ("rms", "layer"))


WRONG = {
    "eps": ["a", True, None, torch.ones(1), float("nan")],
    "weight_offset": ["a", True, float("inf")],
    "scale": ["a", True, torch.ones(1), float("nan")],
    "softcap": ["a", True, 0, -1.0],
    "threshold": ["a", True, float("nan")],
    "k": ["a", True, 1.5, -1, 10**6],
    "keep_last": ["a", True, 1.5, -1],
    "max_selected": ["a", True, 1.5, -1],
    "window": ["a", True, 1.5, 0, -3],
    "query_offset": ["a", True, 1.5, None],
    "max_seqlen_k": ["a", True, 1.5, -1],
    "rotary_dim": ["a", True, 1.5, 3, 0],
    "write_norm": [1, "a", None],
    "copy_input": [1, "a", None],
    "interleaved": [1, "a", None],
    "return_lse": [1, "a", None],
    "norm": [1, "Rms", None],
    "score": [1, "Inner", None],
    "backend": [1, "cuda", None],
}


@pytest.mark.parametrize("op", sorted(set(ok.__all__) - NOT_OPS))
def test_every_number_flag_and_word_of_every_op_is_refused_with_its_name(op: str) -> None:
    call, parameters = calls(Numbers())[op], inspect.signature(getattr(ok, op)).parameters
    asked = {**dict(zip(parameters, call.args, strict=False)), **call.options}
    checked = [name for name in parameters if name in WRONG]
    assert "backend" in checked
    for name in checked:
        for value in WRONG[name]:
            given = {**asked, name: value}
            if name == "threshold":
                given.pop("k")
            with pytest.raises((TypeError, ValueError), match=rf"^{name} (is|has) .*; (it|{name}) (must|may) be"):
                getattr(ok, op)(**given)


def test_a_compiler_reads_them_with_sizes_that_are_not_known() -> None:
    def checked(x: torch.Tensor, window: int) -> torch.Tensor:
        _checks.integer("window", window, at_least=1, at_most=x.shape[0])
        _checks.number("scale", window * 0.5, above=0)
        return x * window

    counter = CompileCounter()
    compiled = torch.compile(checked, backend=counter, fullgraph=True, dynamic=True)
    assert compiled(torch.ones(4), 3).tolist() == [3.0] * 4
    assert compiled(torch.ones(6), 5).tolist() == [5.0] * 6
    assert counter.frame_count == 1


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


QUERIES, KEYS = torch.zeros(3, 4, 8), torch.zeros(6, 2, 8)
PAGES, SCORES = torch.zeros(2, 4, 2, 8), torch.zeros(5)


def paged(table: torch.Tensor, lengths: torch.Tensor, **options: Any) -> Any:
    ends = ints(0, *[3] * lengths.shape[0])
    return ok.sparse_query_attention_paged(QUERIES, PAGES, PAGES, ints(0, 1, 2), ends, table, lengths, **options)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no first query": (
        lambda: ok.sparse_query_attention_varlen(QUERIES, KEYS, KEYS, ints(0, 1, 2), ints(2, 3), ints(0, 6)),
        ValueError,
        "cu_selected begins with 2; it must begin with 0",
    ),
    "keys past the end": (
        lambda: ok.sparse_query_attention_varlen(QUERIES, KEYS, KEYS, ints(0, 1, 8), ints(0, 3), ints(0, 9)),
        ValueError,
        "cu_seqlens_k ends with 9; k has 6",
    ),
    "falling": (
        lambda: ok.select_tokens(SCORES, 1, cu_seqlens=ints(0, 4, 2)),
        ValueError,
        "cu_seqlens falls from 4 to 2",
    ),
    "norm past the end": (
        lambda: ok.rms_norm_score(torch.ones(2, 4), None, 1e-5, cu_seqlens=ints(0, 9)),
        ValueError,
        "cu_seqlens ends with 9; hidden_states has 2",
    ),
    "keys that no page holds": (lambda: paged(ints(0, 1)[None], ints(100)), ValueError, r"seq_lens\[0\] is 100; .* 8,"),
    "a negative length": (lambda: paged(ints(0, 1)[None], ints(-1)), ValueError, r"seq_lens\[0\] is -1"),
    "no such row": (
        lambda: paged(ints(0, 1)[None], ints(2), table_rows=ints(-1)),
        ValueError,
        r"table_rows\[0\] is -1; block_table has rows 0 to 0",
    ),
    "sparse": (lambda: ok.gather_rows(torch.eye(4).to_sparse(), ints(0)), TypeError, "x is a sparse_coo tensor"),
    "negated": (
        lambda: ok.gather_rows(torch._neg_view(torch.ones(2, 4)), ints(0), backend="triton"),
        BackendError,
        "negated when read .*resolve_neg",
    ),
    "out with a gradient": (
        lambda: ok.gather_rows(torch.ones(2, 4), ints(0), out=torch.ones(1, 4, requires_grad=True)),
        BackendError,
        "out= holds a tensor that requires grad",
    ),
    "no head_dim": (
        lambda: ok.sparse_query_attention(*[torch.zeros(1, 1, 1, 0)] * 3, ints(0)[None]),
        ValueError,
        "head_dim must be at least 1",
    ),
    "a huge threshold": (lambda: ok.select_tokens(SCORES[None], threshold=10**400), ValueError, "an int of 1329 bits"),
    "a huge offset": (
        lambda: ok.sparse_query_attention(*[torch.zeros(1, 1, 1, 4)] * 3, ints(0)[None], query_offset=2**31),
        ValueError,
        "query_offset is 2147483648; it must be an int from",
    ),
    "a short out": (
        lambda: ok.select_tokens(SCORES[None], 2, out=(ints(0), ints(0))),
        TypeError,
        "out is a tuple of 2; it must be a tuple",
    ),
    "a ratio of words": (lambda: ok.keep_count(10, "x"), TypeError, "keep_ratio is 'x'"),
    "a count below 0": (lambda: ok.keep_count(-5, 0.5), ValueError, "n_valid is -5; it must be an int from 0"),
    "a mask of floats": (
        lambda: ok.keep_count(ints(5, 6), 0.5, 1, sink_inside=torch.tensor([0.5, 7.0])),
        ValueError,
        "sink_inside is a tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_crash_or_be_wrong_in_silence_is_refused(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_counts_beyond_32_bits_do_not_wrap() -> None:
    assert ok.keep_count(torch.tensor([2**31 + 5, 2**40]), 1.0).tolist() == [2**30, 2**30]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64], ids=str)
def test_counts_of_any_integer_dtype(dtype: torch.dtype) -> None:
    assert ok.keep_count(torch.tensor([100, 3], dtype=dtype), 1 / 3, 2).tolist() == [33, 2]
