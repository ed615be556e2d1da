"""The hash behind random selection: known values, no dependence on anything but its arguments, and random enough."""

import numpy as np
import pytest
import torch

from orthorank_kernels.hashing import GOLDEN, MASK, MULTIPLIERS, mix, position_hash, random_scores

# (seed, layer, position): hash. Written down once: a plan with criterion="random" must mean the same tokens for ever.
KNOWN = {
    (0, 0, 0): 2244525675,
    (0, 12, 0): 2319079103,
    (0, 12, 1): 1208697998,
    (1, 12, 0): 4102773906,
    (7, 27, 2047): 3781992916,
    (2**32 - 1, 3, 5): 2579115284,
    (2**32, 3, 5): 2176515415,
    (2**64 + 1, 200, 2**20): 64021062,
}


def uint32_hash(seed: int, layer: int, positions: list[int]) -> list[int]:
    """The same in NumPy's 32-bit arithmetic, which wraps by itself."""

    def mixed(x: np.ndarray) -> np.ndarray:
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(MULTIPLIERS[0])
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(MULTIPLIERS[1])
        return x ^ (x >> np.uint32(15))

    key = np.zeros(1, dtype=np.uint32)
    for number in (seed, layer):
        while True:
            key = mixed((key ^ np.uint32(number & MASK)) + np.uint32(GOLDEN))
            number >>= 32
            if not number:
                break
    words = mixed(np.array([p % 2**32 for p in positions], dtype=np.uint32) + np.uint32(GOLDEN))
    return mixed(words ^ key).tolist()


def test_known_values() -> None:
    for (seed, layer, position), expected in KNOWN.items():
        assert position_hash(torch.tensor(position), seed=seed, layer=layer).item() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**75 + 3])
@pytest.mark.parametrize("layer", [0, 12, 2**20])
def test_equals_arithmetic_that_wraps(seed: int, layer: int) -> None:
    positions = [-1, 0, 1, 2, 1000, 2**20, 2**31 - 1]
    found = position_hash(torch.tensor(positions), seed=seed, layer=layer)
    assert found.dtype == torch.int64
    assert found.tolist() == uint32_hash(seed, layer, positions)
    narrow = position_hash(torch.tensor(positions, dtype=torch.int32), seed=seed, layer=layer)
    assert torch.equal(narrow, found)


def test_no_product_overflows() -> None:
    assert all(MASK * multiplier < 2**63 for multiplier in MULTIPLIERS)


def test_mix_is_a_bijection_in_small() -> None:
    words = torch.arange(2**16) << 16 | 12345
    assert len(mix(words).unique()) == 2**16
    assert mix(7) == mix(torch.tensor(7)).item()


def test_scores_are_the_upper_bits_exactly() -> None:
    positions = torch.arange(4096)
    scores = random_scores(positions, seed=3, layer=5)
    assert scores.dtype == torch.float32
    assert torch.equal((scores.double() * 2**24).long(), position_hash(positions, seed=3, layer=5) >> 8)
    assert scores.min() >= 0
    assert scores.max() < 1


def test_random_enough() -> None:
    """Layers, seeds and neighbours are not related: correlations of 4096 values, whose standard error is 0.016."""
    positions = torch.arange(4096)
    rows = torch.stack([random_scores(positions, seed=seed, layer=layer) for seed in range(4) for layer in range(8)])
    matrix = torch.corrcoef(torch.cat([rows, rows.roll(1, dims=1), rows.roll(64, dims=1)]))
    assert matrix.fill_diagonal_(0).abs().max() < 0.09
    assert (rows.mean(dim=1) - 0.5).abs().max() < 0.025
    eighths = torch.histc(rows, bins=8, min=0, max=1) / rows.numel()
    assert (eighths - 1 / 8).abs().max() < 0.005


def test_compiles_to_the_same_bits() -> None:
    compiled = torch.compile(lambda p: position_hash(p, seed=9, layer=4), fullgraph=True, backend="eager")
    positions = torch.arange(100)
    assert torch.equal(compiled(positions), position_hash(positions, seed=9, layer=4))


@pytest.mark.parametrize(("seed", "layer"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(seed: int, layer: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed} and layer is {layer}; both must be 0 or more"):
        position_hash(torch.arange(2), seed=seed, layer=layer)
