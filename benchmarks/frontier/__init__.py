"""The frontier of loss against FLOPs: its texts, and the searches that lay a path of plans."""
