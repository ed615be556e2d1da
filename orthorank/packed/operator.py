"""A selected layer as one operator: opaque to compilers, a border for graphs.

What is inside depends on the step, so it is never traced nor captured. Both outputs belong to the caller: a graph that
was captured behind the operator reads fixed addresses, so the operator must write there and may not return tensors of
its own.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """What a name stands for."""

    def run(
        self, positions: Tensor, hidden: Tensor, residual: Tensor, out_hidden: Tensor, out_residual: Tensor
    ) -> None:
        """Compute the layer into ``out_hidden`` and ``out_residual``."""


def _nothing_found(name: str) -> Layer:
    raise LookupError(f"no layer is named {name!r}: nothing said where the layers of orthorank::decoder_layer are")


_find: Callable[[str], Layer] = _nothing_found


def find_layers_by(find: Callable[[str], Layer]) -> None:
    """From now on ``find`` gives the layer of a name. A stack says this once."""
    global _find
    _find = find


def decoder_layer(positions: Tensor, hidden: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Run the layer ``name`` into new tensors, which the caller's graph owns.

    Args:
        positions: int64 ``[tokens]``; hidden, residual: ``[tokens, hidden]``.

    Returns:
        The new ``hidden`` and ``residual``, contiguous.
    """
    contiguous = torch.contiguous_format
    out_hidden = torch.empty_like(hidden, memory_format=contiguous)
    out_residual = torch.empty_like(residual, memory_format=contiguous)
    torch.ops.orthorank.decoder_layer(positions, hidden, residual, out_hidden, out_residual, name)
    return out_hidden, out_residual


def _run(
    positions: Tensor, hidden: Tensor, residual: Tensor, out_hidden: Tensor, out_residual: Tensor, name: str
) -> None:
    _find(name).run(positions, hidden, residual, out_hidden, out_residual)


_LIBRARY = torch.library.Library("orthorank", "FRAGMENT")
_LIBRARY.define(
    "decoder_layer(Tensor positions, Tensor hidden, Tensor residual, Tensor(a!) out_hidden, Tensor(b!) out_residual, "
    "str name) -> ()"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("decoder_layer", _run, _key)
_LIBRARY._register_fake("decoder_layer", lambda *_: None)  # nothing is returned: there are no shapes to say
