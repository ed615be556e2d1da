"""The ops in PyTorch, in blocks and without loops over tokens: for CPUs, other devices, graphs and gradients.

What is right is said in `orthorank_kernels.reference`, which these are tested against.
"""
