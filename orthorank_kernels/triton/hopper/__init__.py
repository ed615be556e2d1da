"""Kernels written for sm_90 alone, in Gluon, in which each warp has a task of its own."""
