"""The paper's own figures, for its models, to stand beside what is measured here (paper, Tables 1 to 4)."""

MODELS = ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "Llama-3-8B", "Mistral-7B", "Mixtral-8x7B")
ABLATION_MODELS = ("Llama-2-13B", "Llama-3-8B", "Mistral-7B", "Mixtral-8x7B")

Figures = tuple[float, ...]

# By row of this package's Table 1: perplexity on C4, one figure for each of MODELS.
PERPLEXITY: dict[str, Figures] = {
    "dense": (7.26, 6.73, 5.71, 9.45, 8.38, 7.41),
    "sleb-10": (8.71, 7.80, 6.32, 12.47, 9.74, 8.28),
    "sleb-10+orthorank": (8.06, 7.39, 6.13, 11.27, 9.31, 8.05),
    "sleb-20": (10.90, 9.42, 7.31, 16.49, 12.38, 9.46),
    "sleb-20+orthorank": (10.04, 8.74, 7.21, 14.95, 11.54, 9.56),
    "shortened-10": (8.79, 7.93, 6.34, 13.28, 9.99, 8.37),
    "shortened-10+orthorank": (8.04, 7.60, 6.29, 11.22, 9.43, 8.47),
}

# Throughput against the dense model: one A6000, batch 32, prompts of 2,048 tokens.
THROUGHPUT: dict[str, float] = {
    "dense": 1.00,
    "sleb-10": 1.11,
    "sleb-10+orthorank": 1.10,
    "sleb-20": 1.25,
    "sleb-20+orthorank": 1.23,
    "shortened-10": 1.11,
    "shortened-10+orthorank": 1.10,
}

# Mean accuracy in per cent over the five zero-shot tasks, for each of MODELS.
ACCURACY: dict[str, Figures] = {
    "dense": (69.00, 71.76, 76.57, 72.87, 74.14, 77.23),
    "sleb-10": (63.13, 66.74, 73.13, 66.94, 68.82, 75.55),
    "sleb-10+orthorank": (65.06, 69.71, 74.56, 69.55, 69.78, 74.41),
    "sleb-20": (58.68, 62.97, 70.82, 58.10, 61.59, 70.84),
    "sleb-20+orthorank": (60.35, 66.99, 71.25, 60.84, 63.38, 72.52),
    "shortened-10": (62.07, 69.72, 74.22, 69.87, 66.63, 71.97),
    "shortened-10+orthorank": (64.79, 70.78, 73.67, 70.77, 68.33, 73.70),
}

# Table 3, at 20 %: perplexity on C4 and accuracy in per cent, for each of ABLATION_MODELS.
ABLATION: dict[str, tuple[Figures, Figures]] = {
    "random": ((10.83, 16.23, 12.05, 9.85), (61.17, 59.15, 62.88, 69.45)),
    "inverse": ((11.85, 18.06, 13.03, 9.76), (58.81, 58.37, 59.47, 66.27)),
    "prenorm": ((9.64, 15.72, 11.53, 9.55), (64.30, 60.82, 63.87, 71.49)),
    "selected-kv": ((9.77, 17.72, 14.21, 10.94), (64.70, 58.76, 61.34, 67.55)),
    "full": ((8.74, 14.95, 11.54, 9.56), (66.99, 60.84, 63.88, 72.85)),
}

# Table 4, Llama-2-13B at 20 %: accuracy in per cent by share of layers and keep ratio.
LAYER_AND_KEEP_RATIO: dict[str, float] = {"0.2 x 0": 62.97, "0.3 x 1/3": 66.99, "0.4 x 1/2": 65.14}
