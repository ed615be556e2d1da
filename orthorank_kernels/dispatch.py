"""Which implementation an op runs.

``backend="auto"`` calls the torch operator, which takes the Triton kernel on a GPU and PyTorch on a CPU. ``"triton"``,
``"torch"`` and ``"reference"`` (the definition of correct, slow and eager) are explicit requests: one that cannot be
met raises and says why; none falls back silently. Inputs that require grad take PyTorch: no kernel has a backward.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd import forward_ad

from orthorank_kernels import checks as _checks
from orthorank_kernels import launch_notes
from orthorank_kernels import op as _library
from orthorank_kernels.op import Operator
from orthorank_kernels.remedies import install

BACKENDS = ("auto", "triton", "torch", "reference")


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run here. The message names the device, the reason and the remedy."""


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (``TRITON_INTERPRET=1`` in the environment)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``, with the remedy, or None when it can.

    >>> import torch
    >>> from orthorank_kernels.dispatch import triton_unavailable
    >>> triton_unavailable(torch.device("meta"))
    'tensors on the meta device hold no data; move them to a GPU, or use backend="torch"'
    """
    if device.type == "meta":
        return 'tensors on the meta device hold no data; move them to a GPU, or use backend="torch"'
    if find_spec("triton") is None:
        return f"Triton is not installed; run: {install('triton')}"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    if device.type == "cpu":
        return (
            "Triton runs on CPU tensors only in its interpreter; move the tensors to a GPU, set TRITON_INTERPRET=1 "
            'before the first import of triton (slow, for tests), or use backend="torch"'
        )
    return f'no Triton kernels are tested for {device.type} devices; use backend="torch"'


def run(
    op: Operator,
    args: tuple[Any, ...],
    *,
    backend: str,
    device: torch.device,
    out: tuple[torch.Tensor | None, ...] | None = None,
) -> Any:
    """Run one public op whose arguments were checked.

    Args:
        op: from `_library.define`; args: its arguments, in the schema's order.
        backend: one of `BACKENDS`.
        device: where the tensors are.
        out: tensors to write to, one for each of ``op.outputs``, checked; None allocates.

    Returns:
        What the op returns; with ``out``, the tuple of these tensors.
    """
    kind = device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # the ops say themselves where they round
            return run(op, args, backend=backend, device=device, out=out)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it may be one of {', '.join(map(repr, BACKENDS))}")
    wanted = torch.is_grad_enabled() or forward_ad._current_level >= 0
    needs_grad = wanted and any(map(_is_differentiated, _tensors(args)))
    if needs_grad and out is not None:
        raise BackendError(
            "out= got an input that requires grad, and what is written to given memory has no gradient; call under "
            "torch.no_grad(), or leave out= away"
        )
    if out is not None and torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in out):
        raise BackendError(
            "out= holds a tensor that requires grad, and what is written to given memory has no gradient; pass "
            "out.detach(), or call under torch.no_grad()"
        )
    if not torch.compiler.is_compiling():  # while tracing, memory has no place yet
        if out is not None:
            _check_apart(op, args, out)
        if out is not None or op.written:
            _check_written(op, args, out, needs_grad)
    if backend == "triton":
        _require_triton(device, needs_grad)
        _check_interpreted(op, args, out)
        if not torch.compiler.is_compiling() and _checks.is_inside_func(*_tensors(args)):
            raise BackendError(
                'backend="triton" got a tensor inside torch.vmap or torch.func, which a kernel cannot look through; '
                'use backend="auto", which runs one member of the batch after the other, or give the op the whole batch'
            )
        for name, value in _named(op, args):
            if value.is_neg():
                raise BackendError(
                    f"{name} is a view whose values are negated when read (of torch.conj, for example), and with "
                    f'backend="triton" kernels read memory as it is; pass {name}.resolve_neg()'
                )
        return _launch(op, args, out)
    if backend == "reference":
        _require_values(device)
    if backend != "auto" or needs_grad:
        compute = op.reference if backend == "reference" else op.pytorch
        if out is None:
            return compute(*args)
        return _into(out, lambda: _library.copy_results(compute(*args), out))
    if launch_notes.THREAD.plain:
        return _launch(op, args, out)
    if out is None:
        return op.functional(*args)
    return _into(out, lambda: op.into(*args, **dict(zip(op.outputs, out, strict=True))))


def _launch(op: Operator, args: tuple[Any, ...], out: tuple[torch.Tensor | None, ...] | None) -> Any:
    """Call the launcher. For plain tensors PyTorch's operator does no more around it than counting the versions of what
    is written to, and costs as much as the checks."""
    launch = _library.launcher(op.launcher)
    result = launch(*args) if out is None else _into(out, lambda: launch(*args, out=out))
    for written in (*(out or ()), *(args[i] for i in op.written)):
        if written is not None and not written.is_inference():
            torch.autograd.graph.increment_version(written)
    return result


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _named(op: Operator, args: tuple[Any, ...]) -> list[tuple[str, torch.Tensor]]:
    return [(n, a) for n, a in zip(op.arguments, args, strict=False) if isinstance(a, torch.Tensor)]


def _check_written(
    op: Operator, args: tuple[Any, ...], out: tuple[torch.Tensor | None, ...] | None, needs_grad: bool
) -> None:
    """What is written to takes values as they are, and PyTorch lets it be written to."""
    outputs = [(f"out[{i}]" if len(out) > 1 else "out", x) for i, x in enumerate(out) if x is not None] if out else []
    changed = [(op.arguments[i], args[i]) for i in op.written]
    for name, value in (*outputs, *changed):
        if value.is_neg():
            raise BackendError(
                f"{name} is a view whose values are negated when read (of torch.conj, for example), and it is written "
                f"to; pass {name}.resolve_neg(), and copy the result back with .copy_()"
            )
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise BackendError(
                f"{name} was made under torch.inference_mode(), and PyTorch lets nothing outside write to it; call "
                f"inside, or pass {name}.clone()"
            )
    for name, value in changed if needs_grad and torch.is_grad_enabled() else ():  # a tangent alone is no obstacle
        if reason := _unwritable(value):
            raise BackendError(
                f"{name} {reason}, and PyTorch lets nothing write to it while gradients are recorded; pass "
                f"{name}.clone(), or call under torch.no_grad()"
            )


def _unwritable(x: torch.Tensor) -> str | None:
    """Why autograd does not let ``x`` be written to, or None."""
    if any(t is not None and t.is_leaf and t.requires_grad for t in (x, x._base)):
        return "is a leaf that requires grad, or a view of one"
    if x._is_view() and torch._C._autograd._get_creation_meta(x) != torch._C._autograd.CreationMeta.DEFAULT:
        return (
            "is a view of a kind that autograd does not follow (of unbind, split or chunk, or made without grad mode)"
        )
    return None


def _check_apart(op: Operator, args: tuple[Any, ...], out: tuple[torch.Tensor | None, ...]) -> None:
    """No output shares memory with an argument, except where it may be that argument, or with another output."""
    named = [(f"out[{i}]" if len(out) > 1 else "out", x) for i, x in enumerate(out) if x is not None]
    inputs = _named(op, args)
    for i, (name, x) in enumerate(named):
        for other_name, other in (*inputs, *named[:i]):
            if not (other_name in op.aliases and _same_view(x, other)):
                _checks.apart(name, x, other_name, other)


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def _is_differentiated(x: torch.Tensor) -> bool:
    """Whether a gradient (backward mode) or a tangent (forward mode) of ``x`` is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _into(out: tuple[torch.Tensor | None, ...], write: Callable[[], Any]) -> tuple[torch.Tensor | None, ...]:
    write()
    return out


def _check_interpreted(op: Operator, args: tuple[Any, ...], out: tuple[torch.Tensor | None, ...] | None) -> None:
    """Triton's interpreter computes with the dtypes of the arguments as a GPU does."""
    if not interpreting() or not any(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in _tensors(args)):
        return
    if not _interprets_bfloat16():
        name = next(name for name, x in _named(op, args) if x.dtype == torch.bfloat16)
        raise BackendError(
            f"{name} has dtype bfloat16, which Triton's interpreter (TRITON_INTERPRET=1) takes for integers, so that "
            'results mean nothing; use float32 or float16, backend="torch", or a GPU'
        )


def _interprets_bfloat16() -> bool:
    """Whether the interpreter adds and rounds bfloat16 as numbers."""
    return _library.launcher("interpreted.interprets_bfloat16")()


def _require_triton(device: torch.device, needs_grad: bool) -> None:
    reason = triton_unavailable(device)
    if reason is not None:
        raise BackendError(f'backend="triton" cannot run on device {device}: {reason}')
    if needs_grad:
        raise BackendError(
            f'backend="triton" on device {device} got an input that requires grad, and the kernels have no '
            'backward; call under torch.no_grad(), or use backend="torch"'
        )


def _require_values(device: torch.device) -> None:
    if torch.compiler.is_compiling() or device.type == "meta":
        raise BackendError(
            'backend="reference" reads values on the host, and '
            + ("a graph that is being compiled" if device.type != "meta" else "the meta device")
            + ' has none; use backend="auto" or backend="torch"'
        )


def device_of(device: object) -> torch.device:
    """``device`` as torch has it.

    Raises:
        ValueError: torch knows no such device. TypeError: it is neither a device nor a string.

    >>> from orthorank_kernels.dispatch import device_of
    >>> device_of("cuda:1")
    device(type='cuda', index=1)
    """
    wanted = "it must be a torch.device or a string such as 'cuda', 'cuda:1' or 'cpu'"
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device is {device!r}; {wanted}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; {wanted}") from None


def describe(device: torch.device | str) -> tuple[str, str]:
    """The backend that ``backend="auto"`` takes on ``device`` and why, for `orthorank env`.

    >>> from orthorank_kernels.dispatch import describe
    >>> describe("cpu")[0]
    'torch'
    """
    device = device_of(device)
    if device.type == "cpu":
        return "torch", "CPUs run the ops in PyTorch"
    if device.type == "cuda":
        reason = triton_unavailable(device)
        return ("triton", "a GPU and Triton are present") if reason is None else ("none", reason)
    return "none", f'operators are registered for CPU and CUDA/ROCm devices; on {device.type} pass backend="torch"'
