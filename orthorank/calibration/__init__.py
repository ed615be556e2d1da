"""What walks a model in order and fits: thresholds, and the maps of corrected plans."""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.calibration.corrections import fit_correction
    from orthorank.calibration.distilling import distill_correction
    from orthorank.calibration.thresholds import calibrate

__all__ = ["calibrate", "distill_correction", "fit_correction"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.calibration.corrections": ("fit_correction",),
        "orthorank.calibration.distilling": ("distill_correction",),
        "orthorank.calibration.thresholds": ("calibrate",),
    },
)
