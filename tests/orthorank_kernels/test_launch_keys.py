"""What the key of a launch plan holds, which calls have none, and of what no plan is made."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import orthorank_kernels as ok
from orthorank_kernels import launch_notes, launch_plan
from orthorank_kernels.settings import lookup


@pytest.fixture
def plans() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        launch_plan.forget()
        patch.setattr(launch_plan, "DEVICES", {"cpu"})
        patch.setattr(launch_notes, "_supported", lambda: True)
        yield patch
        launch_plan.forget()


def numbers(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def key(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    seen = launch_plan._look(ok.gather_rows, args, kwargs, False)
    assert seen is not None
    return seen[0]


def test_each_part_of_a_key_counts(plans):
    x, y, devices = numbers(4), numbers(4), {"cpu", "meta"}
    plans.setattr(launch_plan, "DEVICES", devices)
    keys = [
        key(x), key(numbers(5)), key(x.to("meta")), key(x, x), key(x.int()),
        key(x, y), key(a=x), key(b=x), key(x, 1), key(x, 1.0), key(x, True),
        key(x, "1"), key(x, 0), key(x, 0.0), key(x, -0.0), key(x, None), key(x, False), key(x, "0"), key(x, ""),
        key(x, out=(x, y)), key(x, out=(x, None)), key(x, out=(y, None)), key(x, out=x), key(x, out=y),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(x, y, out=numbers(4)) == key(y, x, out=numbers(4))
    with torch.inference_mode():
        assert key(x, out=y) not in keys
        assert key(x, out=numbers(4)) != key(x, out=y)
        assert key(x) in keys


class Sub(torch.Tensor):
    pass


def test_what_no_key_can_tell_goes_the_long_way(plans):
    def look(*args: Any, **kwargs: Any) -> Any:
        return launch_plan._look(ok.gather_rows, args, kwargs, False)

    x = numbers(4)
    assert look(x) is not None
    assert look([x]) is None
    assert look(x.as_subclass(Sub)) is None
    assert look(x.to_sparse()) is None
    assert look(torch.complex(x, x).conj().imag) is None
    assert look(x.clone().requires_grad_()) is None
    assert look(torch.nn.Parameter(x, requires_grad=False)) is not None
    with torch.no_grad():
        assert look(x.clone().requires_grad_()) is not None
    with torch.autograd.forward_ad.dual_level():
        assert look(x) is None
    with FlopCounterMode(display=False):
        assert look(x) is None
    with torch.profiler.profile():
        assert look(x) is None
    inside = []
    torch.vmap(lambda row: inside.append(look(row)) or row)(x)
    assert inside == [None]
    plans.setattr(launch_plan, "DEVICES", {"xpu"})
    assert look(x) is None


class Compiled:
    """Of a kernel that doubles x into y."""

    packed_metadata, arg_names = (), ("x", "y")

    def __getitem__(self, grid: Any) -> Any:
        return lambda *values: None


def launched(x: torch.Tensor, y: torch.Tensor) -> None:
    launch_notes.note(Compiled, (1,), {"x": x, "y": y}, Compiled())


def clear(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    launched(x, y)
    return y


def a_copy_first(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    launched(x + 1, y)
    return y


def a_result_beside(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return clear(x), x + 1


def a_part_of_more(x: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(2, *x.shape)[0]
    launched(x, y)
    return y


def a_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return clear(x), x.view(-1)


def none_launched(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def settings_change(x: torch.Tensor) -> torch.Tensor:
    result = clear(x)
    if launch_notes.THREAD.notes is not None:
        lookup.forget()
    return result


@pytest.mark.parametrize("op", [clear, a_copy_first, a_result_beside, a_part_of_more, a_view, none_launched,
                                settings_change])  # fmt: skip
def test_no_plan_is_made_of_what_launches_do_not_tell(plans, op):
    planned, x = launch_plan.planned(op), numbers(4, 4)
    for _ in range(3):
        planned(x)
    made = any(isinstance(plan, launch_notes.Plan) for plan in launch_plan._PLANS.values())
    assert made == (op is clear)


def test_what_cannot_be_traced_is_planned_for_its_own_numbers(plans):
    planned = launch_plan.planned(clear)  # `torch.empty_like` keeps whatever order of dimensions
    for tokens in (4, 5, 6):
        for _ in range(3):
            planned(numbers(tokens, 4))
    assert list(launch_plan._KINDS.values()) == [None]
    assert [type(plan) for plan in launch_plan._PLANS.values()] == [launch_notes.Plan] * 3


def test_environment_variables_are_seen_where_they_stand():
    """`os.environ` is asked by a short way; where that is another one, this says so."""
    for name, stored in zip(launch_plan.VARIABLES, launch_plan._NAMES, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, "x")
            assert os.fsdecode(launch_plan._ENVIRON.get(stored)) == "x"
        assert (launch_plan._ENVIRON.get(stored) is None) == (os.environ.get(name) is None)


def test_plans_can_be_switched_off(plans):
    assert launch_plan._look(ok.gather_rows, (numbers(4),), {}, False) is not None
    plans.setenv(launch_plan.SWITCH, "0")
    assert launch_plan._look(ok.gather_rows, (numbers(4),), {}, False) is None
    plans.setenv(launch_plan.SWITCH, "1")
    assert launch_plan._look(ok.gather_rows, (numbers(4),), {}, False) is not None
