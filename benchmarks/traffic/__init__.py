"""Bytes that the kernels ask memory for, counted in Triton's interpreter."""
