"""OrthoRank in serving stacks: what every paged stack needs (`paged`), and vLLM's plugin (`vllm`)."""
