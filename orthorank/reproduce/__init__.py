"""Every table and figure of the paper on a model of one's own, cell by cell, with a verdict on each of its claims."""
