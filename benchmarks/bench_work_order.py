"""How well attention's programs fill a GPU, by a simulation of which one runs where and when. No GPU is needed.

    python benchmarks/bench_work_order.py            # writes benchmarks/results/work_order.json
    python benchmarks/bench_work_order.py --check    # compares with what is there, and writes nothing

A processor takes the next program in the order of their numbers when it is free. A program takes as long as its blocks
of keys, of which a masked one counts 1.28 and the beginning and the end of a program 1.5, as the compiled code has it;
where keys are split, joining the parts counts 1.5 blocks at the end. Given is the share of its time that a GPU is busy
with that, without what splits add: 1 at best. What it leaves out: that programs wait for memory, and for each other in
it. "before" is tile after tile of one head, and splits only where two thirds of the GPU would be idle.

Settings are those of an H100 for 128 channels in bfloat16, with a third of the tokens selected.
"""

import argparse
import heapq
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from orthorank_kernels.triton import configs

RESULTS = Path(__file__).resolve().parent / "results" / "work_order.json"
PROCESSORS = (78, 108, 114, 132, 148)
SHAPES = [(1, 1024 << n) for n in range(8)] + [(8, 2048), (32, 2048)]
MODELS = {"GQA 4": (4, 8), "GQA 8": (8, 8), "MHA": (1, 32)}  # query heads of a key/value head, and of those how many
AROUND, MASKED, JOIN = 1.5, 1.28, 1.5  # blocks
HEAD_DIM, HALF, TARGET = 128, torch.bfloat16, "sm_90"
Work = tuple[int, int, int]  # lane, tile, split


def lane_by_lane(lanes: int, tiles: int, splits: int) -> Iterator[Work]:
    """The order before: a lane is a key/value head of a batch row."""
    return ((lane, tile, split) for lane in range(lanes) for tile in range(tiles) for split in range(splits))


def longest_first(lanes: int, tiles: int, splits: int, together: int) -> Iterator[Work]:
    """The order of the kernel: of ``together`` lanes tile after tile, of which the first have most keys."""
    for first in range(0, lanes, together):
        some = range(first, min(lanes, first + together))
        yield from ((lane, tile, split) for tile in range(tiles) for lane in some for split in range(splits))


def tiles_of(tokens: int, queries: int, block_n: int) -> list[tuple[int, int]]:
    """Of each tile the whole blocks and the masked ones, the last tile first."""
    positions = range(1, tokens, 3)
    found = []
    for end in range(len(positions), 0, -queries):
        low, high = positions[max(0, end - queries)], positions[end - 1]
        found.append(((low + 1) // block_n, high // block_n + 1 - (low + 1) // block_n))
    return found


def cost(tile: tuple[int, int], split: int, splits: int) -> float:
    whole, masked = tile
    begin, end = ((whole + masked) * n // splits for n in (split, split + 1))
    behind = max(0, end - max(begin, whole))
    return AROUND + (end - begin - behind) + MASKED * behind


def time_of(costs: Iterable[float], processors: int) -> float:
    """When the last program ends."""
    free = [0.0] * processors
    for one in costs:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def splits_before(programs: int, keys: int, block_n: int, processors: int) -> int:
    count = min(processors // programs, keys // (4 * block_n))
    return count if count >= 3 else 1


def measured(model: str, batch: int, tokens: int, processors: int) -> dict[str, float]:
    """The share of the time that a GPU is busy, before and after."""
    group, kv_heads = MODELS[model]
    constexprs, *_ = configs.launch_settings(HEAD_DIM, group, HALF, TARGET, tokens // 3)
    pack, block_m, block_n = (int(constexprs[name]) for name in ("PACK", "BLOCK_M", "BLOCK_N"))
    tiles, head_tiles = tiles_of(tokens, block_m // pack, block_n), -(-group // pack)
    lanes = batch * kv_heads * head_tiles
    together, _ = configs.together(head_tiles, lanes, 0, 2 * tokens * HEAD_DIM * HALF.itemsize)
    with mock.patch.object(configs, "_multiprocessors", return_value=processors):
        now = configs.splits(len(tiles) * lanes, tokens, block_m, block_n, torch.device("cpu"))
    old = splits_before(len(tiles) * lanes, tokens, block_n, processors)
    work = sum(cost(tile, 0, 1) for tile in tiles) * lanes / processors

    def share(order: Callable[..., Iterator[Work]], splits: int, *more: int) -> float:
        programs = order(lanes, len(tiles), splits, *more)
        spent = time_of((cost(tiles[tile], split, splits) for _, tile, split in programs), processors)
        return round(work / (spent + (JOIN if splits > 1 else 0)), 3)

    return {"before": share(lane_by_lane, old), "after": share(longest_first, now, together), "splits": now}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    shapes = {f"{batch}x{tokens}": (batch, tokens) for batch, tokens in SHAPES}
    found = {
        model: {name: {str(n): measured(model, *shape, n) for n in PROCESSORS} for name, shape in shapes.items()}
        for model in MODELS
    }
    for model, by_shape in found.items():
        for name, by_count in by_shape.items():
            shares = ", ".join(f"{n}: {x['before']:.3f} to {x['after']:.3f}" for n, x in by_count.items())
            print(f"{model:6} {name:9} {shares}")
    if options.check:
        return int(json.loads(RESULTS.read_text(encoding="utf-8")) != found)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
