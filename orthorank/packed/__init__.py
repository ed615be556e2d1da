"""A selected layer over a packed batch and a paged cache, of whatever serving stack."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.hf.correction import map_of
    from orthorank.packed.layer import PackedParts, RMSNorm, packed_forward
    from orthorank.packed.selection import PackedRows
    from orthorank.packed.sinks import SinkBank
    from orthorank.packed.steps import Step, make_step
    from orthorank.packed.views import pages_of_slots, split_last

__all__ = [
    "PackedParts",
    "PackedRows",
    "RMSNorm",
    "SinkBank",
    "Step",
    "make_step",
    "map_of",
    "packed_forward",
    "pages_of_slots",
    "split_last",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.hf.correction": ("map_of",),
        "orthorank.packed.layer": ("PackedParts", "RMSNorm", "packed_forward"),
        "orthorank.packed.selection": ("PackedRows",),
        "orthorank.packed.sinks": ("SinkBank",),
        "orthorank.packed.steps": ("Step", "make_step"),
        "orthorank.packed.views": ("pages_of_slots", "split_last"),
    },
)
