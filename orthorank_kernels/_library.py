"""The operator library: one torch operator per public op.

Each public op has exactly one `torch.library` operator in the namespace `orthorank_kernels`. The CPU implementation is
the PyTorch reference, the CUDA implementation is the Triton launcher (imported when it first runs), and the fake
implementation states shapes, dtypes and strides, so that `torch.compile(fullgraph=True)` and `opcheck` work.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

NAMESPACE = "orthorank_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, *, cpu: Callable[..., Any], triton: str, fake: Callable[..., Any]) -> Any:
    """Define the operator of one public op and return it.

    Args:
        schema: name and signature in torch's schema language. Ops that write to an argument mark it ``(a!)`` and
            return ``()``.
        cpu: the reference, called with the schema's arguments in order.
        triton: name of the launcher as ``"module.function"`` inside ``orthorank_kernels.triton``.
        fake: what the outputs look like, from the inputs alone.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, _lazy_launcher(triton), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.orthorank_kernels, name).default


def launcher(path: str) -> Callable[..., Any]:
    """The Triton launcher named ``"module.function"`` inside ``orthorank_kernels.triton``."""
    module, function = path.rsplit(".", 1)
    try:
        return getattr(import_module(f"orthorank_kernels.triton.{module}"), function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            "a GPU tensor needs Triton, which is not installed; run: pip install 'orthorank-kernels[triton]', or pass "
            'backend="reference"'
        ) from error


def _lazy_launcher(path: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return launcher(path)(*args)

    return call
