"""Choosing the layers: their number, the calibration loss, greedy search, one-shot scores and block influence.

>>> from orthorank.search import layer_count
>>> layer_count(32, 0.2, keep_ratio=1/3)
9
"""

from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.config import layer_count
    from orthorank.search.greedy import begin_search, greedy_round, greedy_search
    from orthorank.search.influence import block_influence
    from orthorank.search.one_shot import loss_scores, magnitude_scores, one_shot_candidates, rank_layers
    from orthorank.search.run import run_search
    from orthorank.search.settings import SearchSettings
    from orthorank.search.state import SearchInterrupted, SearchState, evaluation_count, halving_stages
    from orthorank.search.taylor import taylor_scores
    from orthorank.stack.evaluator import Evaluator
    from orthorank.stack.resources import OneProcess, Processes
    from orthorank.stack.sink import candidate_layers, detect_sink

__all__ = [
    "Evaluator",
    "OneProcess",
    "Processes",
    "SearchInterrupted",
    "SearchSettings",
    "SearchState",
    "begin_search",
    "block_influence",
    "candidate_layers",
    "detect_sink",
    "evaluation_count",
    "greedy_round",
    "greedy_search",
    "halving_stages",
    "layer_count",
    "loss_scores",
    "magnitude_scores",
    "one_shot_candidates",
    "rank_layers",
    "run_search",
    "taylor_scores",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.config": ("layer_count",),
        "orthorank.search.greedy": ("begin_search", "greedy_round", "greedy_search"),
        "orthorank.search.influence": ("block_influence",),
        "orthorank.search.one_shot": ("loss_scores", "magnitude_scores", "one_shot_candidates", "rank_layers"),
        "orthorank.search.run": ("run_search",),
        "orthorank.search.settings": ("SearchSettings",),
        "orthorank.search.state": ("SearchInterrupted", "SearchState", "evaluation_count", "halving_stages"),
        "orthorank.search.taylor": ("taylor_scores",),
        "orthorank.stack.evaluator": ("Evaluator",),
        "orthorank.stack.resources": ("OneProcess", "Processes"),
        "orthorank.stack.sink": ("candidate_layers", "detect_sink"),
    },
)
