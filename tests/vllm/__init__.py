"""vLLM with a plan, the real engine on a CPU: run by `make test-vllm` in an environment of its own."""
