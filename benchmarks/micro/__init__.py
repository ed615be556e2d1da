"""Microbenchmarks of every op beside its reference, its compiled reference and the kernels of others."""
