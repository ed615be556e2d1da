"""Measurements; each module is a command. Run them from the root of the checkout."""
