"""A selected layer over the paged cache of a serving stack; vllm: the plugin."""
