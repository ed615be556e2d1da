"""What a plan saves and costs: time and memory, measured here or inside vLLM, and estimated from a configuration."""
