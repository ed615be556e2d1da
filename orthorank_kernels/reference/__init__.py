"""The definition of correct: each op in plain statements, one sequence and mostly one token at a time.

For reading, and for comparing with (``backend="reference"``). All of it is slow, and none can be traced: values are
read on the host. Gradients flow. Arguments are those of the operators, in order and checked; products and sums run in
float32 (float64 stays float64), and results are rounded once where models round. CPUs run `orthorank_kernels.pytorch`.
"""
