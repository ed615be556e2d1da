"""PyTorch references, one module per public module: they define what is correct, and they are the CPU path."""
