"""Plans on serving stacks. vllm: the plugin."""
