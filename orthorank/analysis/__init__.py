"""The paper's analyses on any model: how states turn towards the sink, and which tokens are worth selecting."""

from orthorank.analysis.layerwise import LayerComparison, compare_layers
from orthorank.analysis.similarity import Similarities, measure_similarities

__all__ = ["LayerComparison", "Similarities", "compare_layers", "measure_similarities"]
