"""OrthoRank on Hugging Face models: in chosen layers, update only the tokens most orthogonal to the sink token.

>>> from orthorank import OrthoRankConfig
>>> OrthoRankConfig(layers=[12, 13], keep_ratio=1/3).keep_last
1
"""

from orthorank.apply import Handle, apply, handle_of, status
from orthorank.config import OrthoRankConfig
from orthorank.errors import OrthoRankError
from orthorank.families import FAMILIES
from orthorank_kernels._version import __version__

__all__ = ["FAMILIES", "Handle", "OrthoRankConfig", "OrthoRankError", "__version__", "apply", "handle_of", "status"]
