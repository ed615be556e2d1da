"""Microbenchmarks of every op beside PyTorch, compiled PyTorch and the kernels of others."""
