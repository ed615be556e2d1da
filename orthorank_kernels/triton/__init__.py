"""Triton kernels and their launchers, one module per public module. Imported when a kernel first runs."""
