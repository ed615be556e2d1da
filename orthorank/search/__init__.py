"""Choosing the layers: the number of them, the calibration loss, and the greedy search."""

from orthorank.search.counts import evaluation_count, layer_count
from orthorank.search.evaluator import Evaluator
from orthorank.search.greedy import SearchInterrupted, SearchState, greedy_search
from orthorank.sink import candidate_layers

__all__ = [
    "Evaluator",
    "SearchInterrupted",
    "SearchState",
    "candidate_layers",
    "evaluation_count",
    "greedy_search",
    "layer_count",
]
