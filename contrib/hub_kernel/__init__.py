"""`orthorank_kernels` as a kernel for Hugging Face `kernels`: python -m contrib.hub_kernel FOLDER."""
