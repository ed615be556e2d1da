"""The operator library: the torch operators of the public ops.

Each public op has one functional `torch.library` operator in the namespace `orthorank_kernels`, and one more that
writes into tensors of the caller (``out=``), so that a captured graph or a serving stack's pool owns the memory. An
op's parameters are written once: the annotated function in `orthorank_kernels.pytorch` is the CPU implementation, and
its signature is the schema. The CUDA implementation is the Triton launcher (imported when it first runs), and the fake
implementation states shapes, dtypes and strides, so that `torch.compile(fullgraph=True)` and `opcheck` work.

PyTorch takes an operator once in a process. So that importing these modules again (`importlib.reload`, a notebook that
reloads what was edited) is harmless, an operator calls what is in a table, which a second import only refills.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from orthorank_kernels.remedies import install

NAMESPACE = "orthorank_kernels"
PACKAGE = __name__.rpartition(".")[0]  # another one in a copy for the Hub, which may be in the same process


@dataclass(frozen=True)
class _Registered:
    """What PyTorch was given: the operators by name, each with its schema and its implementations by kind."""

    library: torch.library.Library
    schemas: dict[str, str]
    implementations: dict[str, dict[str, Callable[..., Any]]]


def _registered() -> _Registered:
    kept = vars(getattr(torch.ops, NAMESPACE))  # lives as long as the operators
    if "registered" not in kept:
        kept["registered"] = _Registered(torch.library.Library(NAMESPACE, "DEF"), {}, {})
    return kept["registered"]


@dataclass(frozen=True)
class Operator:
    """One public op: its torch operators, and its implementations.

    Args:
        functional: returns new tensors.
        reference, pytorch: what is correct, and what CPUs and gradients take; called with the schema's arguments.
        launcher: ``"module.function"`` inside ``orthorank_kernels.triton``, called likewise; if the op has ``outputs``,
            also with ``out=``: a tuple of tensors to write, one for each of them (None where it may be left out).
        outputs: names of what the op returns; empty for ops that write to an argument.
        into: writes to the tensors it gets by those names, and returns None.
        aliases: arguments that an output may be, the same view of the same memory.
        arguments: their names, in the schema's order; written: places of those that an in-place op writes to.
    """

    functional: Any
    reference: Callable[..., Any]
    pytorch: Callable[..., Any]
    launcher: str
    outputs: tuple[str, ...] = ()
    into: Any = None
    aliases: tuple[str, ...] = ()
    arguments: tuple[str, ...] = field(init=False)
    written: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        arguments = (
            self.functional._schema.arguments
        )  # walking it takes longer than a check may: once, and not per call
        written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        object.__setattr__(self, "arguments", tuple(argument.name for argument in arguments))
        object.__setattr__(self, "written", tuple(written))


def define(
    pytorch: Callable[..., Any],
    *,
    reference: Callable[..., Any],
    triton: str,
    fake: Callable[[SimpleNamespace], Any] | None = None,
    outputs: Sequence[str] = (),
    aliases: tuple[str, ...] = (),
    changes: tuple[str, ...] = (),
) -> Operator:
    """Define the operators of one public op. Its name, its parameters and their defaults are those of ``pytorch``.

    Args:
        pytorch: annotated with what `torch.library.infer_schema` knows. An op that writes to an argument returns None.
        reference, triton, outputs, aliases: see `Operator`. An output whose name ends in ``?`` may be left out by the
            caller of the variant with ``out=``; the functional operator returns an empty tensor where it is not asked
            for.
        fake: what the outputs look like, from the arguments by name: ``fake(call)``, with ``call.hidden_states`` and so
            on; None: there are none.
        changes: names of the arguments that are written to.
    """
    name, signature = pytorch.__name__, inspect.signature(pytorch)
    schema = torch.library.infer_schema(pytorch, mutates_args=changes)

    def look_like(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return None if fake is None else fake(SimpleNamespace(**call.arguments))

    defaults = tuple(parameter.default for parameter in signature.parameters.values())

    def launch(*args: Any, **out: Any) -> Any:
        return launcher(triton)(*args, *defaults[len(args) :], **out)  # PyTorch leaves out what is the default

    _implement(name, f"{name}{schema}", pytorch, launch, look_like)
    functional = getattr(getattr(torch.ops, NAMESPACE), name).default
    if not outputs:
        return Operator(functional, reference, pytorch, triton)
    arguments = schema[1 : schema.rindex(") ->")]
    names = tuple(o.removesuffix("?") for o in outputs)
    writes = [f"Tensor({chr(97 + i)}!){'?' * o.endswith('?')} {names[i]}" for i, o in enumerate(outputs)]

    def write_results(*args: Any, **out: torch.Tensor | None) -> None:
        copy_results(pytorch(*args), tuple(out.values()))

    def write_kernel(*args: Any, **out: torch.Tensor | None) -> None:
        launch(*args, out=tuple(out.values()))

    into = f"{name}_out"
    _implement(
        into, f"{into}({arguments}, *, {', '.join(writes)}) -> ()", write_results, write_kernel, lambda *a, **k: None
    )
    return Operator(
        functional, reference, pytorch, triton, names, getattr(getattr(torch.ops, NAMESPACE), into).default, aliases
    )


def copy_results(results: Any, out: Sequence[torch.Tensor | None]) -> None:
    """Copy results into the caller's tensors."""
    results = results if isinstance(results, tuple) else (results,)
    for result, target in zip(results, out, strict=True):
        if target is not None:
            target.copy_(result)


def launcher(path: str) -> Callable[..., Any]:
    """The Triton launcher named ``"module.function"`` inside ``orthorank_kernels.triton``."""
    name, function = path.rsplit(".", 1)
    name = f"{PACKAGE}.triton.{name}"
    module = sys.modules.get(name)
    try:
        if module is None or getattr(module.__spec__, "_initializing", False):
            module = import_module(name)  # which asks that as well, and takes as long as a launch
        return getattr(module, function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f'a GPU tensor needs Triton, which is not installed; run: {install("triton")}, or pass backend="torch"'
        ) from error


def _implement(
    name: str, schema: str, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    registered = _registered()
    registered.implementations[name] = {"cpu": cpu, "cuda": cuda, "fake": fake}
    if name in registered.schemas:
        if registered.schemas[name] != schema:
            raise RuntimeError(
                f"the operator {NAMESPACE}::{name} is registered with another schema, as after reloading another "
                "version of the package; PyTorch keeps an operator for the life of a process: restart Python"
            )
        return
    library, current = registered.library, registered.implementations
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, lambda *args, **kwargs: current[name]["cpu"](*args, **kwargs), "CPU")
    library.impl(name, lambda *args, **kwargs: current[name]["cuda"](*args, **kwargs), "CUDA")
    torch.library.register_fake(
        f"{NAMESPACE}::{name}", lambda *args, **kwargs: current[name]["fake"](*args, **kwargs), lib=library
    )
    registered.schemas[name] = schema
