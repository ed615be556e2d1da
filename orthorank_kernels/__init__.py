"""Triton kernels for OrthoRank's token selection, each with a PyTorch reference that defines correct."""

from orthorank_kernels._version import __version__

__all__ = ["__version__"]
