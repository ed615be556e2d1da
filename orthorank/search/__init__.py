"""Choosing the layers: the number of them, the calibration loss, and the greedy search."""

from orthorank.search.counts import evaluation_count, halving_stages, layer_count
from orthorank.search.evaluator import Evaluator
from orthorank.search.greedy import begin_search, greedy_round, greedy_search
from orthorank.search.processes import OneProcess, Processes
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.sink import candidate_layers

__all__ = [
    "Evaluator",
    "OneProcess",
    "Processes",
    "SearchInterrupted",
    "SearchState",
    "begin_search",
    "candidate_layers",
    "evaluation_count",
    "greedy_round",
    "greedy_search",
    "halving_stages",
    "layer_count",
]
