"""Parts of bench_retrieval.py."""
