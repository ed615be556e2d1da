"""Counts what a GPU would be asked to do, on fake CUDA tensors: kernels launched, and bytes that they move.

Every operation that is no view and no allocation is one launch and moves its distinct inputs and outputs once. An op of
`orthorank_kernels` runs its launcher, whose kernels are noted and not run: each is a launch, and so is whatever else
the launcher does. Of tensors that an op indexes by position, the rows that it asks for are counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import orthorank_kernels
from orthorank_kernels import op as _library
from tests.orthorank_kernels.fake_gpu import Gpus

FREE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze",
    "slice", "select", "detach", "alias", "split", "split_with_sizes", "chunk", "as_strided", "unbind", "narrow",
    "empty", "empty_like", "new_empty", "empty_strided", "empty_permuted", "lift_fresh",
}  # fmt: skip
MATMULS = {"mm", "bmm", "addmm", "baddbmm", "sparse_query_attention"}
# Arguments of which an op touches rows alone, and how many: those of this argument or result.
ROWS = {
    "gather_rows": ("x", "result"),
    "gather_add_rms_norm": ("hidden_states", "addend"),
    "scatter_add_rows_": ("out", "rows"),
}


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, the bytes it moves, and whether it multiplies matrices."""

    name: str
    bytes: int
    matmul: bool


class Launches(TorchDispatchMode):
    """Inside `fake_gpus`: the launches of everything that runs within."""

    def __init__(self, gpus: Gpus) -> None:
        super().__init__()
        self.gpus = gpus
        self.launches: list[Launch] = []
        self.inside = 0  # of a launcher, whose bytes are those of its op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == _library.NAMESPACE:
            before = len(self.gpus.launches)
            self.inside += 1
            how = kwargs
            if name.endswith("_out"):  # into memory of the caller
                name, how = name.removesuffix("_out"), {"out": tuple(kwargs.values())}
            with self:
                result = LAUNCHERS[name](*args, **how)
            self.inside -= 1
            assert len(self.gpus.launches) > before, f"no launch of {name} was seen"
            for number in range(before, len(self.gpus.launches)):
                first = number == before
                self._note(name, _bytes_of_op(name, func, args, kwargs, result) if first else 0)
            return result if how is kwargs else None
        result = func(*args, **kwargs)
        if name not in FREE and func.namespace != "prim":
            self._note(name, 0 if self.inside else sum(map(_bytes, _distinct([args, kwargs, result]))))
        return result

    def _note(self, name: str, moved: int) -> None:
        self.launches.append(Launch(name, moved, name in MATMULS))

    @property
    def names(self) -> list[str]:
        """In order."""
        return [launch.name for launch in self.launches]

    @property
    def bytes_outside_matmuls(self) -> int:
        """Of all launches but matrix products and attention."""
        return sum(launch.bytes for launch in self.launches if not launch.matmul)


def _operators() -> Iterator[_library.Operator]:
    for value in vars(orthorank_kernels).values():
        module = getattr(value, "__module__", None)
        if isinstance(module, str) and module.startswith("orthorank_kernels."):
            found = vars(__import__(module, fromlist=["_"])).values()
            yield from (x for x in found if isinstance(x, _library.Operator))


def _launcher(operator: _library.Operator) -> Callable[..., Any]:
    defaults = [a.default_value if a.has_default_value() else None for a in operator.functional._schema.arguments]

    def launch(*args: Any, **kwargs: Any) -> Any:
        return _library.launcher(operator.launcher)(*args, *defaults[len(args) :], **kwargs)  # PyTorch leaves them out

    return launch


LAUNCHERS = {op.functional._schema.name.split("::")[1]: _launcher(op) for op in _operators()}


def _bytes_of_op(name: str, func: Any, args: Any, kwargs: Any, result: Any) -> int:
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    if name == "apply_rotary_at":  # half of the angles of each token
        turned = named["x"].shape[0] * named["x"].shape[2] if named["positions"] is not None else named["cos"].shape[1]
        angles = turned * named["cos"].shape[2] * named["cos"].element_size()
        return 2 * _bytes(named["x"]) + angles
    moved = sum(map(_bytes, _distinct([args, kwargs, result])))
    if name in ROWS:
        whole, rows = ROWS[name]
        moved += _bytes(result if rows == "result" else named[rows]) - _bytes(named[whole])
    return moved


def _distinct(values: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(values)
    return list(found.values())


def _bytes(x: Tensor) -> int:
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count
