"""What one call of a model holds: prompt or generated tokens, padding, where the sinks are."""
