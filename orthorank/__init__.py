"""OrthoRank on Hugging Face models: in chosen layers, update only the tokens most orthogonal to the sink token.

>>> from orthorank import OrthoRankConfig
>>> OrthoRankConfig(layers=[12, 13], keep_ratio=1/3).keep_last
1
"""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.calibration.corrections import fit_correction
    from orthorank.calibration.distilling import distill_correction
    from orthorank.common.criteria import register_criterion
    from orthorank.common.errors import OrthoRankError
    from orthorank.config import OrthoRankConfig
    from orthorank.export import export_pruned
    from orthorank.families import Family
    from orthorank.families.known import FAMILIES, register_family
    from orthorank.hf.apply import Handle, apply, context, handle_of, status
    from orthorank.hf.family_check import check_family
    from orthorank.models import load_model
    from orthorank.stack.causal_attention import register_causal_attention
    from orthorank_kernels._version import __version__

__all__ = [
    "FAMILIES",
    "Family",
    "Handle",
    "OrthoRankConfig",
    "OrthoRankError",
    "__version__",
    "apply",
    "check_family",
    "context",
    "distill_correction",
    "export_pruned",
    "fit_correction",
    "handle_of",
    "load_model",
    "register_causal_attention",
    "register_criterion",
    "register_family",
    "status",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.calibration.corrections": ("fit_correction",),
        "orthorank.calibration.distilling": ("distill_correction",),
        "orthorank.common.criteria": ("register_criterion",),
        "orthorank.common.errors": ("OrthoRankError",),
        "orthorank.config": ("OrthoRankConfig",),
        "orthorank.hf.apply": ("Handle", "apply", "context", "handle_of", "status"),
        "orthorank.export": ("export_pruned",),
        "orthorank.families.known": ("FAMILIES", "register_family"),
        "orthorank.families": ("Family",),
        "orthorank.hf.family_check": ("check_family",),
        "orthorank.models": ("load_model",),
        "orthorank.stack.causal_attention": ("register_causal_attention",),
        "orthorank_kernels._version": ("__version__",),
    },
)
