"""What walks a model in order and fits: thresholds."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.calibration.thresholds import calibrate

__all__ = ["calibrate"]

__getattr__, __dir__ = exports(__name__, {"orthorank.calibration.thresholds": ("calibrate",)})
