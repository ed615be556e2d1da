"""The attention kernel in every layout and with every option, against the definition written out in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_kernels.triton import configs
from tests.orthorank_kernels.attention_layouts import LAYOUTS, check, some
from tests.orthorank_kernels.tools import DTYPES

pytestmark = pytest.mark.filterwarnings("error:.* encountered in:RuntimeWarning")  # the interpreter computed a NaN
RAGGED = ((17, 50), (0, 40), (37, 70), (1, 1))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.31},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "window": {"window": 20},
    "everything": {"scale": 0.9, "softcap": 3.0, "sinks": True, "window": 33},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], layout: str) -> None:
    check(some(RAGGED, **options), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, layout: str) -> None:
    check(some(RAGGED, (6, 2), 64, dtype, softcap=20.0, sinks=True), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int, layout: str) -> None:
    check(some([(9, 33), (3, 50)], (2, 1), dim), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_splits(splits: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them more splits than blocks of keys, and sequences without queries."""
    monkeypatch.setattr(configs, "splits", lambda *_: splits)
    for name in ("sinks", "everything"):
        check(some([(4, 130), (0, 5), (1, 3)], **OPTIONS[name]), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_in_any_order_of_programs(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits are joined in order, whichever ends first."""
    from triton.runtime import interpreter

    monkeypatch.setattr(configs, "splits", lambda *_: 3)
    sequences = some([(4, 130), (1, 60)], sinks=True)
    first = LAYOUTS[layout](sequences)
    launch = interpreter.GridExecutor.__call__
    place = interpreter.interpreter_builder.set_grid_idx

    def backwards(self: Any, *args: Any, **kwargs: Any) -> Any:
        builder = interpreter.interpreter_builder
        turned = lambda *at: place(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", turned)
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", backwards)
    for a, b in zip(first, LAYOUTS[layout](sequences), strict=True):
        assert torch.equal(a, b)


@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_any_shape(data: st.DataObject) -> None:
    any_shape(data)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_of_many_shapes(data: st.DataObject) -> None:
    any_shape(data)


def any_shape(data: st.DataObject) -> None:
    count = st.integers(0, 60)
    lengths = [(min(a, b), b) for a, b in data.draw(st.lists(st.tuples(count, count), min_size=1, max_size=4))]
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 5), (1, 17)]))
    options = {
        "window": data.draw(st.none() | st.integers(1, 100)),
        "softcap": data.draw(st.none() | st.floats(1, 50)),
        "sinks": data.draw(st.booleans()),
    }
    sequences = some(lengths, (kv_heads * group, kv_heads), data.draw(st.sampled_from([8, 16, 24])), **options)
    run = data.draw(st.sampled_from(sorted(LAYOUTS)))
    with pytest.MonkeyPatch.context() as patch:
        splits = data.draw(st.integers(1, 3))
        patch.setattr(configs, "splits", lambda *_: splits)
        check(sequences, LAYOUTS[run])
