"""What the plugin expects of vLLM, looked at without PyTorch, plans or the plugin."""
