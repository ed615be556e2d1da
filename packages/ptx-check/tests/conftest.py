"""The tests need neither PyTorch nor Triton: what imports Triton is not looked through for examples."""

collect_ignore = ["tutorials.py"]
