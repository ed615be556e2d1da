"""A selected layer over the paged cache of a serving stack; vllm: the plugin."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.serving.layer import Parts, RMSNorm, selected_forward
    from orthorank.serving.selection import Chosen
    from orthorank.serving.sinks import SinkBank
    from orthorank.serving.steps import Step, make_step
    from orthorank.serving.views import pages_of_slots, split_last

__all__ = [
    "Chosen",
    "Parts",
    "RMSNorm",
    "SinkBank",
    "Step",
    "make_step",
    "pages_of_slots",
    "selected_forward",
    "split_last",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.serving.layer": ("Parts", "RMSNorm", "selected_forward"),
        "orthorank.serving.selection": ("Chosen",),
        "orthorank.serving.sinks": ("SinkBank",),
        "orthorank.serving.steps": ("Step", "make_step"),
        "orthorank.serving.views": ("pages_of_slots", "split_last"),
    },
)
