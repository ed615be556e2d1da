"""Query-key pairs that attention computes against those it needs, from its launch settings alone.

A tile of queries is as long as its last query asks for: what lies past the others' own positions is computed and thrown
away, and so are the rest of the last key block and the rows of a tile that hold no query. Tiles are filled from the
last query backwards, so that these rows are in the tile with the fewest keys. The first key blocks of a tile, which all
of its queries see whole, need no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Of one group of query heads that share a key/value head."""

    needed: int
    executed: int
    blocks: int
    masked_blocks: int

    @property
    def ratio(self) -> float:
        """Executed over needed: 1 at best."""
        return self.executed / self.needed

    @property
    def masked_share(self) -> float:
        return self.masked_blocks / self.blocks


def count_pairs(
    positions: Sequence[int], *, block_m: int, block_n: int, pack: int = 1, group: int = 1, from_last: bool = True
) -> Pairs:
    """Count them for one sequence.

    Args:
        positions: ascending, of the queries on the key axis. A query sees the keys up to its own position.
        block_m: rows of a tile, of which each ``pack`` hold the heads of one query. block_n: keys of a block.
        group: query heads that share a key/value head, in tiles of ``pack`` heads.
        from_last: tiles are filled from the last query backwards, as ours are; False: from the first one, as others'.

    >>> count_pairs([0, 1, 2, 3], block_m=2, block_n=2)
    Pairs(needed=10, executed=12, blocks=3, masked_blocks=2)
    >>> count_pairs([0, 1, 2], block_m=2, block_n=2)  # the tile of query 0 alone is the one with an idle row
    Pairs(needed=6, executed=12, blocks=3, masked_blocks=2)
    """
    needed = group * sum(position + 1 for position in positions)
    queries, head_tiles = block_m // pack, -(-group // pack)
    blocks = masked = 0
    over = 0 if from_last else -len(positions) % queries  # idle rows of the tile that ends with the last query
    for end in range(len(positions) + over, 0, -queries):
        low, high = positions[max(0, end - queries)], positions[min(end, len(positions)) - 1]
        whole = (low + 1) // block_n
        all_blocks = -(-(high + 1) // block_n)
        blocks += all_blocks
        masked += all_blocks - whole
    return Pairs(needed, blocks * block_m * block_n * head_tiles, blocks * head_tiles, masked * head_tiles)


def selected_positions(tokens: int, selected: int, seed: int = 0) -> list[int]:
    """A random choice of so many tokens, ascending, without token 0: the sink is never selected."""
    chosen = np.random.default_rng(seed).choice(np.arange(1, tokens), size=selected, replace=False)
    return sorted(int(position) for position in chosen)
