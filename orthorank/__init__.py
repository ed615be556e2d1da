"""OrthoRank on Hugging Face models: in chosen layers, update only the tokens most orthogonal to the sink token.

>>> from orthorank import OrthoRankConfig
>>> OrthoRankConfig(layers=[12, 13], keep_ratio=1/3).keep_last
1
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthorank.common.errors import OrthoRankError
    from orthorank.config import OrthoRankConfig
    from orthorank.hf.apply import Handle, apply, context, handle_of, status
    from orthorank.hf.families import FAMILIES, register_family
    from orthorank.hf.family import Family
    from orthorank.hf.family_check import check_family
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
    "handle_of",
    "register_family",
    "status",
]

# Imported when first asked for: torch takes seconds, and the command line should answer, and stop, before that.
_HOMES = {
    "OrthoRankConfig": "orthorank.config",
    "OrthoRankError": "orthorank.common.errors",
    "FAMILIES": "orthorank.hf.families",
    "Family": "orthorank.hf.family",
    "Handle": "orthorank.hf.apply",
    "apply": "orthorank.hf.apply",
    "check_family": "orthorank.hf.family_check",
    "context": "orthorank.hf.apply",
    "handle_of": "orthorank.hf.apply",
    "register_family": "orthorank.hf.families",
    "status": "orthorank.hf.apply",
    "__version__": "orthorank_kernels._version",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
