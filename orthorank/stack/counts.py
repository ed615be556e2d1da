"""How many layers a sparsity asks for, and how many evaluations a search takes.

A selected layer leaves out ``1 - keep_ratio`` of the token updates, so a sparsity p over L layers needs
``L * p / (1 - keep_ratio)`` of them, rounded down; layer pruning is ``keep_ratio = 0``.
"""

import math

from orthorank.common.errors import OrthoRankError

_ROUNDING = 1e-6  # repairs products such as 30 * 0.2 / (2 / 3), which may fall just below 9


def layer_count(num_layers: int, sparsity: float, keep_ratio: float = 0.0) -> int:
    """Layers to switch for a nominal sparsity: ``floor(num_layers * sparsity / (1 - keep_ratio) + 1e-6)``.

    Args:
        num_layers: decoder layers of the model.
        sparsity: share of token-layer updates to leave out, above 0 and below 1.
        keep_ratio: share of tokens that a switched layer still updates, 0 (layer pruning) to below 1. The paper's
            "33 %" is 1/3.

    Returns:
        The number of layers (paper, section 4.1: the layer ratio), which may be 0.

    Raises:
        OrthoRankError: an argument out of range, or more layers would be needed than there are.

    Example:
        >>> layer_count(32, 0.2, 1/3), layer_count(32, 0.2)  # OrthoRank and layer pruning at 20 %
        (9, 6)
    """
    if num_layers < 1:
        raise OrthoRankError(f"num_layers is {num_layers}; it must be at least 1")
    if not 0 < sparsity < 1:
        raise OrthoRankError(f"sparsity is {sparsity}; it must be above 0 and below 1, such as 0.2 for 20 %")
    if not 0 <= keep_ratio < 1:
        raise OrthoRankError(
            f"keep_ratio is {keep_ratio}; it must be from 0 (layer pruning) to below 1 (1 leaves nothing out)"
        )
    count = math.floor(num_layers * sparsity / (1 - keep_ratio) + _ROUNDING)
    if count > num_layers:
        raise OrthoRankError(
            f"a sparsity of {sparsity} with keep_ratio {keep_ratio:.4g} needs {count} layers and the model has "
            f"{num_layers}; lower the sparsity to at most {1 - keep_ratio:.4g}, or lower keep_ratio"
        )
    return count


def evaluation_count(candidates: int, rounds: int) -> int:
    """Loss evaluations of a greedy search: ``rounds * candidates - rounds * (rounds - 1) / 2``.

    With SLEB's candidates, all layers but the first and the last, this is R(L - 2) - R(R - 1)/2.

    Raises:
        OrthoRankError: more rounds than candidates, or a negative number.

    Example:
        >>> evaluation_count(30 - 2, 6)
        153
    """
    if not 0 <= rounds <= candidates:
        raise OrthoRankError(f"rounds is {rounds}; it must be from 0 to the number of candidate layers, {candidates}")
    return rounds * candidates - rounds * (rounds - 1) // 2


def halving_stages(candidates: int, windows: int, batch_size: int = 1) -> list[tuple[int, int]]:
    """How a round of the fast search divides its work: all candidates see few windows, the best half twice as many, ...

    Successive halving (Jamieson and Talwalkar, 2016), over the calibration windows.

    Args:
        candidates: layers that may be switched in this round.
        windows: calibration windows in all; batch_size: how many run together, which is the least that is seen.

    Returns:
        For each stage, how many windows have been seen after it, and by how many candidates. The first sees an eighth
        of the windows or one batch, the last all of them.

    Example:
        >>> halving_stages(16, windows=4)
        [(1, 16), (2, 8), (4, 4)]
    """
    batches = -(-windows // batch_size)
    seen = -(-batches // 8)
    stages = [(min(seen * batch_size, windows), candidates)]
    while seen < batches:
        seen, candidates = min(2 * seen, batches), -(-candidates // 2)
        stages.append((min(seen * batch_size, windows), candidates))
    return stages
