"""What only the paper's Table 3 needs, by the same hook as criteria of one's own (`orthorank.register_criterion`).

The criteria that OrthoRank is compared with are registered here, when `orthorank.hf.criteria` is imported.
"""

import torch
from torch import Tensor

from orthorank.common.criteria import Criterion, add
from orthorank_kernels import rms_norm_score
from orthorank_kernels.hashing import random_scores


def inverse(x: Tensor, sink: Tensor, valid: Tensor, *, scores: Tensor) -> Tensor:
    """The least orthogonal tokens first, the paper's counter-example (Figure 4)."""
    return -scores


def at_random(x: Tensor, sink: Tensor, valid: Tensor, *, positions: Tensor, layer: int, seed: int) -> Tensor:
    """Any, by a hash of seed, layer and place in the row; what is not a number last, as by a score."""
    return torch.where(x.isnan().any(dim=-1), torch.nan, random_scores(positions, seed=seed, layer=layer))


def prenorm(x: Tensor, sink: Tensor, valid: Tensor) -> Tensor:
    """The paper's score on the states before the norm (Table 3: the stage)."""
    return rms_norm_score(x, None, 0.0, norm="identity", sink=sink).scores


add(Criterion("inverse", inverse, pointwise=True, needs=("scores",)))
add(Criterion("random", at_random, pointwise=True, needs=("positions", "layer", "seed")))
add(Criterion("prenorm", prenorm, pointwise=True, normed=False))
