"""A selected layer over the paged cache of a serving stack; vllm: the plugin."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.serving.layer import PackedParts, RMSNorm, packed_forward
    from orthorank.serving.selection import PackedRows
    from orthorank.serving.sinks import SinkBank
    from orthorank.serving.steps import Step, make_step
    from orthorank.serving.views import pages_of_slots, split_last

__all__ = [
    "PackedParts",
    "PackedRows",
    "RMSNorm",
    "SinkBank",
    "Step",
    "make_step",
    "packed_forward",
    "pages_of_slots",
    "split_last",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.serving.layer": ("PackedParts", "RMSNorm", "packed_forward"),
        "orthorank.serving.selection": ("PackedRows",),
        "orthorank.serving.sinks": ("SinkBank",),
        "orthorank.serving.steps": ("Step", "make_step"),
        "orthorank.serving.views": ("pages_of_slots", "split_last"),
    },
)
