"""Launch plans: a call by plan does what the call does, and a call of another kind is none of its."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import orthorank_kernels as ok
from orthorank_kernels import launch_notes, launch_plan
from orthorank_kernels import op as library
from orthorank_kernels.settings import lookup
from orthorank_kernels.triton import configs
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Shapes, Sizes, calls, flat
from tests.orthorank_kernels.planning import by_plan_alone, planning
from tests.orthorank_kernels.tools import DEVICE

pytest.importorskip("triton")

SMALL = Sizes(batch=2, tokens=16, selected=5, hidden=32, heads=4, kv_heads=2, head_dim=16)
NAMES = list(calls(Shapes("meta")))
FEW = (
    "apply_rotary_and_cache_",
    "gather_add_rms_norm",
    "gather_rows",
    "scatter_add_rows_",
    "silu_and_mul, merged, packed",
    "sparse_query_attention",
)


@pytest.fixture
def plans() -> Iterator[pytest.MonkeyPatch]:
    with planning() as patch:
        yield patch


def results(call: Call, **more: Any) -> list[torch.Tensor]:
    """What a call returns, or what it wrote to."""
    returned = call(backend="triton", **more)
    return flat(returned) if call.op not in IN_PLACE else call.written()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow]) for n in NAMES])
def test_a_call_by_plan_is_the_call(plans, name):
    sizes = SMALL.with_(tokens=48, selected=16) if "attention" in name else SMALL
    first, second, third, expected = (calls(Numbers(DEVICE, seed=i), sizes)[name] for i in (0, 1, 2, 2))
    wanted = results(expected)
    launch_plan.forget()
    results(first)
    results(second)
    with by_plan_alone(plans):
        found = results(third)
    assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in wanted]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    for x in flat(third.tensors()) if name not in IN_PLACE else []:
        assert x.data_ptr() != found[0].data_ptr(), "new memory"


@pytest.mark.slow
def test_memory_that_is_needed_beside_the_results(plans):
    """Zeros to count in, and parts of what was split."""
    plans.setattr(configs, "splits", lambda *args: 2)
    for op, sizes in (("rms_norm_select", SMALL), ("sparse_query_attention", SMALL.with_(tokens=48, selected=16))):
        launch_plan.forget()
        first, second, third = (calls(Numbers(DEVICE, seed=i), sizes)[op] for i in range(3))
        bare = [Call(call.op, call.args, {}) for call in (first, second, third)]
        results(bare[0])
        results(bare[1])
        with by_plan_alone(plans):
            found = results(bare[2])
        (plan,) = launch_plan._PLANS.values()
        launch_plan.forget()
        for x, y in zip(found, results(bare[2]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert len(plan.made) > len(found), "there is such memory"


def test_memory_of_the_caller_by_plan(plans):
    first, second, third = (calls(Numbers(DEVICE, seed=i), SMALL)["gather_add_rms_norm"] for i in range(3))
    expected = third()
    for call in (first, second):
        call(backend="triton", out=tuple(map(torch.empty_like, expected)))
    out = tuple(map(torch.empty_like, expected))
    version = out[0]._version
    with by_plan_alone(plans):
        found = third(backend="triton", out=out)
    assert type(found) is type(expected)
    assert all(x is y for x, y in zip(found, out, strict=True))
    assert out[0]._version > version, "who saved it for a gradient must see that it changed"
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_no_operator_stands_around_a_call_that_a_plan_may_be_made_of(plans):
    """From the first call on, and what is written to has another version after each."""

    def refuse(*args: Any) -> None:
        raise AssertionError("this call went by the operator")

    for implementations in library._registered().implementations.values():
        plans.setitem(implementations, DEVICE, refuse)
    out, expected, rows = numbers(1, 8, 16), numbers(1, 8, 16), -numbers(1, 2, 16)
    expected[:, [3, 1]] = rows
    for _ in range(4):
        version, fresh = out._version, numbers(1, 8, 16)
        ok.scatter_rows_(out, places(3, 1), rows)
        assert out._version > version
        assert out.equal(expected)
        taken = torch.empty(1, 2, 16, device=DEVICE)
        ok.gather_rows(fresh, places(3, 1), out=taken)
        assert taken.equal(fresh[:, [3, 1]])
        assert taken._version > 0
    for seen in (torch.profiler.profile(), variable(launch_plan.SWITCH, "0")):
        with seen, pytest.raises(AssertionError, match="by the operator"):
            ok.scatter_rows_(out, places(3, 1), rows)


def test_a_call_that_comes_between_keeps_its_gradient(plans):
    """A signal handler's, for example, while another call is under way that a plan may be made of."""
    x = numbers(1, 8, 16).requires_grad_()

    def interrupted() -> torch.Tensor:
        ok.gather_rows(numbers(1, 8, 16), places(3, 1))
        assert launch_notes.THREAD.plain, "what is under way goes on as it began"
        return ok.gather_rows(x, places(3, 1))

    launch_plan._plainly(interrupted, (), {}).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert not launch_notes.THREAD.plain


@pytest.mark.filterwarnings("ignore")  # of torch.jit, about what a trace does not follow
def test_a_trace_records_the_operator(plans):
    for _ in range(3):  # of a kind of call that there is a plan for, too
        traced = torch.jit.trace(lambda x: ok.gather_rows(x, places(3, 1)), numbers(1, 8, 16), check_trace=False)
        fresh = -numbers(1, 8, 16)
        assert traced(fresh).equal(fresh[:, [3, 1]])
        ok.gather_rows(fresh, places(3, 1))


def gather(x: torch.Tensor, positions: torch.Tensor, **more: Any) -> torch.Tensor:
    return ok.gather_rows(x, positions, backend="triton", **more)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel()), device=DEVICE).reshape(shape).to(dtype)


def places(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int32, device=DEVICE)


def test_a_call_like_it_has_the_same_plan(plans):
    for _ in range(3):
        gather(numbers(1, 8, 16), places(3, 1))
    assert len(launch_plan._PLANS) == 1
    with by_plan_alone(plans):
        assert gather(numbers(1, 8, 16), places(2, 7)).equal(numbers(1, 8, 16)[:, [2, 7]])


LIKE = {
    "more tokens": lambda: (numbers(1, 9, 16), places(3, 1)),
    "more selected": lambda: (numbers(1, 8, 16), places(3, 1, 2)),
    "both": lambda: (numbers(1, 64, 16), places(3, 63, 2, 2, 1)),
    "another stride": lambda: (numbers(1, 8, 32)[..., :16], places(3, 1)),
    "expanded": lambda: (numbers(1, 1, 16).expand(1, 8, 16), places(3, 1)),
    "a larger batch": lambda: (numbers(2, 8, 16), places(3, 1).expand(2, 2)),
}
OTHER = {
    "an odd offset": lambda: (numbers(129)[1:].view(1, 8, 16), places(3, 1)),
    "a stride that is no multiple of 16": lambda: (numbers(1, 8, 20)[..., :16], places(3, 1)),
    "none selected": lambda: (numbers(1, 8, 16), places()),
    "another width": lambda: (numbers(1, 8, 12), places(3, 1)),
    "another dtype": lambda: (numbers(1, 8, 16, dtype=torch.float16), places(3, 1)),
    "packed": lambda: (numbers(8, 16), places(3, 1)[0]),
}


@pytest.mark.parametrize("change", LIKE)
def test_other_lengths_have_plans_that_follow_from_the_first(plans, change):
    for _ in range(2):
        gather(numbers(1, 8, 16), places(3, 1))
    x, positions = LIKE[change]()
    for _ in range(2):
        with by_plan_alone(plans):
            assert gather(x, positions).equal(x[:, positions[0].tolist()])
    assert len(launch_plan._PLANS) == 2


@pytest.mark.parametrize("change", OTHER)
def test_other_tensors_are_planned_anew(plans, change):
    for _ in range(3):
        gather(numbers(1, 8, 16), places(3, 1))
    x, positions = OTHER[change]()
    with by_plan_alone(plans), pytest.raises(AssertionError, match="the long way"):
        gather(x, positions)
    for _ in range(3):
        assert gather(x, positions).equal(x[..., positions.flatten().tolist(), :])
    assert len(launch_plan._PLANS) == 2


def test_a_kind_that_goes_more_ways_than_are_kept(plans):
    plans.setattr(launch_plan, "WAYS", 1)
    for _ in range(2):
        gather(numbers(1, 8, 16), places(3, 1))
    for width in (12, 24):
        with by_plan_alone(plans), pytest.raises(AssertionError, match="the long way"):
            gather(numbers(1, 8, width), places(3, 1))
        for _ in range(2):
            gather(numbers(1, 8, width), places(3, 1))
        with by_plan_alone(plans):
            assert gather(numbers(1, 8, width), places(3, 1)).equal(numbers(1, 8, width)[:, [3, 1]])
    assert [len(ways) for ways in launch_plan._KINDS.values()] == [1]


def test_bad_lengths_are_refused_as_ever(plans):
    for _ in range(2):
        gather(numbers(2, 8, 16), places(3, 1).expand(2, 2))
    for _ in range(2):
        with pytest.raises(ValueError, match="its first dimension must be the batch, 3"):
            gather(numbers(3, 8, 16), places(3, 1).expand(2, 2))
        with by_plan_alone(plans):
            gather(numbers(3, 8, 16), places(3, 1).expand(3, 2))


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


KIND = "rows of 4096 bytes"
AROUND = {
    "TRITON_INTERPRET": lambda: variable("TRITON_INTERPRET", "true"),
    "ORTHORANK_AUTOTUNE": lambda: variable("ORTHORANK_AUTOTUNE", "1"),
    "other settings": lambda: lookup.overridden("gather_rows", KIND, {"bytes": 64, "num_warps": 1}),
}


@pytest.mark.parametrize("change", AROUND)
def test_other_surroundings_are_planned_anew(plans, change):
    for _ in range(3):
        gather(numbers(1, 8, 16), places(3, 1))
    assert len(launch_plan._KINDS) == 1
    with AROUND[change](), by_plan_alone(plans), pytest.raises(AssertionError, match="the long way"):
        gather(numbers(1, 8, 16), places(3, 1))
    lookup.forget()
    gather(numbers(1, 8, 16), places(3, 1))
    assert len(launch_plan._KINDS) == 3


def test_what_is_written_over_what_is_read_is_refused_by_name(plans):
    out, rows, positions = numbers(8, 16), numbers(2, 16), places(3, 1)[0]
    for _ in range(3):
        ok.scatter_rows_(out, positions, rows, backend="triton")
    with pytest.raises(ValueError, match="out shares memory with rows"):
        ok.scatter_rows_(out, positions, out[4:6], backend="triton")
    longer = numbers(64, 16)
    with pytest.raises(ValueError, match="out shares memory with rows"):  # of lengths that were never there
        ok.scatter_rows_(longer[:62], positions, longer[60:62], backend="triton")
    with by_plan_alone(plans):
        ok.scatter_rows_(out, positions, numbers(2, 16), backend="triton")


def cached(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Sequence[int] = (11, 0)) -> None:
    """A token written to each of the slots, as a rule the last and the first."""
    keys, angles = numbers(len(slots), k_cache.shape[2], 8) + 1, numbers(len(slots), 8) / 8
    where = torch.tensor(slots, device=DEVICE)
    ok.apply_rotary_and_cache_(k_cache, v_cache, where, keys, -keys, angles.cos(), angles.sin(), backend="triton")


def test_caches_between_each_other_are_planned_at_their_distance(plans):
    """Keys and values of a head side by side, as vLLM has them: they take turns in memory and share none."""

    def views(kv: torch.Tensor, begin: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        kv = kv.transpose(1, 2)
        return kv.narrow(-1, 0, 8), kv.narrow(-1, begin, 8)

    for _ in range(3):
        cached(*views(numbers(3, 1, 4, 16)))
    expected, found = (numbers(3, 1, 4, 16) for _ in range(2))
    with variable(launch_plan.SWITCH, "0"):
        cached(*views(expected))
    assert not torch.equal(expected, found)
    for layout, plan in ((views, True), (lambda kv: views(kv)[::-1], False)):  # values before keys: another distance
        found = numbers(3, 1, 4, 16)
        with by_plan_alone(plans) if plan else contextlib.nullcontext():
            cached(*layout(found))
        wanted = expected if plan else torch.cat(expected.split(8, -1)[::-1], -1)
        at = torch.tensor([True, *[False] * 10, True]).view(3, 4)
        assert torch.equal(found.squeeze(1)[at], wanted.squeeze(1)[at])
        assert torch.equal(found.squeeze(1)[~at], numbers(3, 4, 16)[~at])
    with by_plan_alone(plans), pytest.raises(AssertionError, match="the long way"):
        cached(*views(numbers(3, 1, 4, 16))[::-1])
    with pytest.raises(ValueError, match="k_cache shares memory with v_cache"):
        cached(*views(numbers(3, 1, 4, 16), begin=4))


def test_a_distance_that_keeps_caches_apart_holds_for_their_shapes_alone(plans):
    """Blocks of a head one after the other: two of each lie side by side, and of three the last meets the first."""

    def views(blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv, shape, strides = numbers(640), (blocks, 8, 2, 8), (64, 8, 256, 1)
        return kv.as_strided(shape, strides), kv.as_strided(shape, strides, 128)

    for _ in range(3):
        cached(*views(2), [3, 0])
    with pytest.raises(ValueError, match="k_cache shares memory with v_cache"):
        cached(*views(3), [3, 0])


def test_memory_made_in_inference_mode_is_not_written_outside(plans):
    with torch.inference_mode():
        kept = numbers(1, 8, 16)
        for _ in range(3):
            ok.scatter_rows_(kept, places(3, 1), numbers(1, 2, 16), backend="triton")
    with pytest.raises(Exception, match="inference_mode"):
        ok.scatter_rows_(kept, places(3, 1), numbers(1, 2, 16), backend="triton")


def test_plans_are_bounded(plans):
    plans.setattr(launch_plan, "MOST", 3)
    for dtype in (torch.float32, torch.float16, torch.float64):
        for tokens in range(4, 8):
            gather(numbers(1, tokens, 4, dtype=dtype), places(3, 1))
            gather(numbers(tokens, 4, dtype=dtype), places(3, 1)[0])
            assert len(launch_plan._PLANS) <= 3
            assert len(launch_plan._KINDS) <= 3
