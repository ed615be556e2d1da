"""OrthoRank on Hugging Face models."""

from orthorank_kernels._version import __version__

__all__ = ["__version__"]
