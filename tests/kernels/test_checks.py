"""The argument checks that the public ops share: what passes, what they say, that a compiler reads them."""

import inspect
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import orthorank_kernels as ok
from orthorank_kernels import _checks
from tests.kernels.every_op import NOT_OPS, Numbers, calls


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
