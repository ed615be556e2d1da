"""Choosing the layers: their number, the calibration loss, greedy search, one-shot scores and block influence."""

from orthorank.search.counts import evaluation_count, halving_stages, layer_count
from orthorank.search.evaluator import Evaluator
from orthorank.search.greedy import begin_search, greedy_round, greedy_search
from orthorank.search.influence import block_influence
from orthorank.search.one_shot import loss_scores, magnitude_scores, one_shot_candidates, rank_layers
from orthorank.search.processes import OneProcess, Processes
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.search.taylor import taylor_scores
from orthorank.sink import candidate_layers

__all__ = [
    "Evaluator",
    "OneProcess",
    "Processes",
    "SearchInterrupted",
    "SearchState",
    "begin_search",
    "block_influence",
    "candidate_layers",
    "evaluation_count",
    "greedy_round",
    "greedy_search",
    "halving_stages",
    "layer_count",
    "loss_scores",
    "magnitude_scores",
    "one_shot_candidates",
    "rank_layers",
    "taylor_scores",
]
