"""What the kernels compile to, for GPUs that need not be present: cases, limits, measurements."""
