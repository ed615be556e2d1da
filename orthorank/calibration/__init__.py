"""What walks a model in order and fits: thresholds."""
