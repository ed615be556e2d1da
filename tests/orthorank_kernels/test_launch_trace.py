"""Plans for all lengths: what a program gives for other numbers is what the long way does with them."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank_kernels import launch_plan
from orthorank_kernels.launch_numbers import Program, value_of
from orthorank_kernels.launch_trace import Trace, UntraceableError
from tests.orthorank_kernels.every_op import Call, Shapes, Sizes, calls, flat
from tests.orthorank_kernels.planning import planning

pytest.importorskip("triton")

SMALL = Sizes(batch=2, tokens=48, selected=16, hidden=32)
OTHERS = [
    SMALL.with_(tokens=64, selected=21), SMALL.with_(tokens=49, selected=17), SMALL.with_(tokens=51, selected=17),
    SMALL.with_(batch=3), SMALL.with_(batch=1), SMALL.with_(tokens=2, selected=1), SMALL.with_(selected=1),
    SMALL.with_(selected=0), SMALL.with_(tokens=2046, selected=50), SMALL.with_(tokens=8192, selected=2731),
    SMALL.with_(batch=1, tokens=8192, selected=3000), SMALL.with_(hidden=34), SMALL.with_(heads=8),
    SMALL.with_(batch=32, tokens=640, selected=640),
]  # fmt: skip
Launched = list[tuple[Any, tuple[int, ...], dict[str, Any]]]


class Recorded:
    """Stands for a compiled kernel: notes its arguments, with addresses for tensors."""

    packed_metadata = ()

    def __init__(self, kernel: Any, launched: Launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*values: Any) -> None:
            self.launched.append((self.kernel, grid, dict(zip(self.kernel.arg_names, values, strict=True))))

        return launch


@pytest.fixture
def launched() -> Iterator[Launched]:
    """What is launched, and not run: in place of the interpreter's kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    found: Launched = []

    def item(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> Recorded:
            values = {name: arguments[name] for name in kernel.arg_names}
            where = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            found.append((kernel, (*grid, 1, 1)[:3], where))
            return Recorded(kernel, found)

        return launch

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        """What PyTorch's own asks of a tensor on a GPU."""
        assert (x.is_cuda, x.get_device()) == (False, -1)
        yield

    with planning() as patch:
        patch.setattr(torch.cuda, "device_of", device_of)
        patch.setattr(InterpretedFunction, "__getitem__", item)
        yield found


def done(call: Call, launched: Launched) -> Any:
    """What a call launches and returns, without addresses of new memory."""
    launched.clear()
    returned = call(backend="triton")
    given = {x.data_ptr() for x in call.tensors().values()}

    def plain(value: Any) -> Any:
        return "new" if type(value) is int and value > 2**40 and value not in given else value

    results = [(x.shape, x.stride(), x.dtype) for x in flat(returned)]
    return [(k.fn.__name__, grid, {n: plain(v) for n, v in a.items()}) for k, grid, a in launched], results


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(launch_plan.SWITCH, "0")
        yield


NAMES = list(calls(Shapes("meta")))


def test_what_follows_for_other_lengths_is_what_the_long_way_launches(launched):
    """For all ops: with sizes that go the same way and another one, and again."""
    ways = []
    for name in NAMES:
        launch_plan.forget()
        for sizes in (SMALL, SMALL, *OTHERS, *OTHERS):
            call = calls_of(sizes)[name]
            with without_plans():
                wanted = done(call, launched)
            assert done(call, launched) == wanted, f"{name}, {sizes}"
        kinds = launch_plan._KINDS.values()
        assert None not in kinds, f"{name} is not traced"
        ways.append(sum(map(len, kinds)))
    assert sum(ways) < len(NAMES) * len(OTHERS) / 2, "most sizes follow from others"


_CALLS: dict[Sizes, dict[str, Call]] = {}


def calls_of(sizes: Sizes) -> dict[str, Call]:
    if sizes not in _CALLS:
        _CALLS[sizes] = calls(Shapes("cpu"), sizes)
    return _CALLS[sizes]


def program_of(function: Callable[..., Any], *numbers: int) -> Callable[..., Any]:
    program = Program(numbers)
    return program.function([function(*program.numbers)])


def settings(a: int, b: int) -> tuple[int, ...]:
    """Questions and arithmetic as launchers have them."""
    width = 1 << (a - 1).bit_length()
    few = min(8, max(1, b // 5))
    return width, -(-b // few), 3 * b % 7 if b % 4 else 2 - b, (b and a // b) + b * 1, {1: 2, 2: 3}.get(min(a, 2), 5)


def test_a_program_gives_what_the_function_does_or_nothing():
    for traced in (1, 3), (3, 7), (2, 4), (5, 60), (6, 0):
        program = program_of(settings, *traced)
        found = {(a, b): program(a, b) for a in range(1, 12) for b in range(80)}
        assert found[traced] is not None
        assert all(x in (None, [settings(*at)]) for at, x in found.items())
        assert all(a == traced[0] for a, _ in found if found[a, _] is not None), "its bit length is a constant"
        if traced == (5, 60):
            assert sum(x is not None for x in found.values()) > 5


@pytest.mark.parametrize(
    "use", [float, str, hash, lambda n: range(n), lambda n: [0] * 9 + [n][:n], lambda n: n / 2, lambda n: n**-0.5,
            lambda n: f"{n} rows", lambda n: n << 1, lambda n: 2.5 * n, lambda n: n < 2.5, lambda n: divmod(n, 3)],
)  # fmt: skip
def test_what_is_not_followed_is_fixed(use):
    program = program_of(lambda n: (use(n), n)[1], 5)
    assert program(5) == [5]
    assert program(6) is None


KERNEL = SimpleNamespace(
    params=[
        SimpleNamespace(name="plain", is_constexpr=False, do_not_specialize=False),
        SimpleNamespace(name="any", is_constexpr=False, do_not_specialize=True),
        SimpleNamespace(name="CONSTANT", is_constexpr=True, do_not_specialize=False),
    ]
)


@pytest.mark.parametrize(("name", "value", "same", "others"), [
    ("plain", 5, [2, 17, 2**31 - 1], [1, 16, 0, 2**31, -(2**31) - 1]),
    ("plain", 32, [16, 0, -16], [1, 5, 2**31]),
    ("plain", 1, [], [0, 2, 16]),
    ("plain", 2**31, [2**40], [16, 2**31 + 1, 2**63]),
    ("any", 5, [1, 16, -1], [2**31]),
    ("CONSTANT", 5, [], [4, 6]),
    ("num_warps", 4, [], [8]),
])  # fmt: skip
def test_the_compiled_kernel_is_the_same(name, value, same, others):
    """As Triton chooses it: by constants, ones, multiples of 16 and the width of ints."""
    trace = Trace([value], [(KERNEL, (1,), {name: value}, "compiled")])
    assert trace.launch(KERNEL, (1,), {name: trace.program.numbers[0]}) == "compiled"
    program = trace.program.function([trace.program.numbers[0]])
    assert [program(n) for n in (value, *same)] == [[n] for n in (value, *same)]
    assert [program(n) for n in others] == [None] * len(others)


def test_another_launch_than_the_noted_one_is_refused():
    for then in ((KERNEL, (2,), {"any": 3}), (KERNEL, (1,), {"any": 4}), (None, (1,), {"any": 3})):
        trace = Trace([3], [(*then, "compiled")])
        with pytest.raises(UntraceableError, match="the call launched"):
            trace.launch(KERNEL, (1,), {"any": trace.program.numbers[0]})


def traced(function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    trace = Trace([n for x in tensors for n in (*x.shape, *x.stride())], [])
    args, _ = trace.arguments(tensors, {})
    with trace:
        return [value_of(part) for part in function(*args)], trace


@pytest.mark.parametrize("view", [
    lambda x: x.unsqueeze(0), lambda x: x.unsqueeze(-1), lambda x: x.unsqueeze(1), lambda x: x.transpose(0, 2),
    lambda x: x.squeeze(1), lambda x: x.squeeze(0), lambda x: x.narrow(-1, 2, 3), lambda x: x.view(torch.int32),
    lambda x: torch.empty(x.shape[0], 3, x.shape[2]), lambda x: x.new_empty(x.shape[:2]),
    lambda x: x.new_zeros(x.shape[2], x.shape[0]).transpose(0, 1), lambda x: torch.empty_permuted(x.shape, (1, 2, 0)),
    lambda x: torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format),
])  # fmt: skip
def test_views_have_the_layouts_that_pytorch_gives_them(view):
    x = torch.empty(4, 1, 6)
    found, _ = traced(lambda x: (lambda y: (y.shape, y.stride(), y.numel(), y.is_contiguous(), y.size(0)))(view(x)), x)
    y = view(x)
    assert found == [tuple(y.shape), y.stride(), y.numel(), y.is_contiguous(), y.size(0)]


@pytest.mark.parametrize("view", [
    lambda x: x[0], lambda x: x + 1, lambda x: x.flatten(), lambda x: x.view(24), lambda x: torch.empty_like(x),
    lambda x: x.new_empty(9).narrow(0, 0, 3), lambda x: torch.arange(x.shape[0]), lambda x: x.max(),
])  # fmt: skip
def test_what_is_not_traced_is_refused(view):
    with pytest.raises((UntraceableError, TypeError)):
        traced(lambda x: (view(x),), torch.empty(4, 1, 6))


def test_one_tensor_given_twice_has_one_shape():
    x = torch.empty(4, 6)
    _, trace = traced(lambda a, b: (a.shape, b.shape), x, x)
    program = trace.program.function(list(trace.program.numbers))
    assert program(4, 6, 6, 1, 4, 6, 6, 1) is not None
    assert program(4, 6, 6, 1, 5, 6, 6, 1) is None
