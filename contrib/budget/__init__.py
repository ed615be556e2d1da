"""Mixed plans under a budget: each layer dense, selecting at one of several keep ratios, or removed."""
