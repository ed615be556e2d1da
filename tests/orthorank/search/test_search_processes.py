"""Windows shared by processes, played by threads: the same bits on every rank as in one process."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from orthorank.search import Evaluator, greedy_search
from orthorank.stack.layers import LayerStack
from tests.orthorank.plain_search import LAYERS, random_windows, small_stack


class Exchange:
    """What `size` ranks, each in a thread of its own, have to say to each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.said: list[list[float]] = [[]] * size


class Rank:
    """One of them, as the evaluator sees it."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self.exchange, self.rank, self.size = exchange, rank, exchange.size
        self.calls = 0

    def gather(self, values: list[float]) -> list[list[float]]:
        self.calls += 1
        self.exchange.said[self.rank] = list(values)
        self.exchange.barrier.wait()
        all_values = [list(said) for said in self.exchange.said]
        self.exchange.barrier.wait()
        return all_values


def on_every_rank(size: int, work: Callable[[Rank, LayerStack], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks, which run at the same time, each with a model of its own."""
    stacks = [small_stack() for _ in range(size)]
    ranks = [Rank(exchange := Exchange(size), 0)]
    ranks += [Rank(exchange, rank) for rank in range(1, size)]
    results: list[Any] = [None] * size

    def run(rank: Rank) -> None:
        try:
            results[rank.rank] = work(rank, stacks[rank.rank])
        except BaseException:
            exchange.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({rank.calls for rank in ranks}) == 1, "every rank gathers as often as the others"
    assert ranks[0].calls > 0
    return results


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return random_windows(5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), [(2, 1), (3, 2), (4, 3)])
def test_the_same_search_on_every_rank(windows: Tensor, size: int, batch_size: int, fast: bool) -> None:
    """Also where a rank has no window: three ranks share three batches, four ranks two."""
    candidates = range(1, LAYERS - 1)
    alone = greedy_search(Evaluator(small_stack(), windows, batch_size=batch_size), candidates, 2, fast=fast)

    def work(rank: Rank, stack: LayerStack) -> Any:
        evaluator = Evaluator(stack, windows, batch_size=batch_size, processes=rank)
        return greedy_search(evaluator, candidates, 2, fast=fast)

    for state in on_every_rank(size, work):
        assert (state.chosen, state.losses) == (alone.chosen, alone.losses), "bit for bit"


def test_limits_hold_for_all_ranks(windows: Tensor) -> None:
    """Also where one rank gives up (rank 0 after two of its three windows) and the other comes to its end."""
    full = Evaluator(small_stack(), windows, batch_size=1).loss([3])

    def work(rank: Rank, stack: LayerStack) -> list[float]:
        evaluator = Evaluator(stack, windows, batch_size=1, processes=rank)
        return [evaluator.loss([3], limit) for limit in (full, 0.3 * full, full / 20, math.inf)]

    assert on_every_rank(2, work) == [[full, math.inf, math.inf, full]] * 2


def test_one_batch_size_for_all(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank with the least memory decides."""

    def work(rank: Rank, stack: LayerStack) -> int:
        return Evaluator(stack, windows, processes=rank).batch_size

    assert on_every_rank(2, work) == [2, 2]
    short = threading.local()
    monkeypatch.setattr("orthorank.stack.resources.free_bytes", lambda device: getattr(short, "bytes", 2**30))

    def on_a_full_machine(rank: Rank, stack: LayerStack) -> int:
        if rank.rank == 1:
            short.bytes = 1000
        return work(rank, stack)

    assert on_every_rank(2, on_a_full_machine) == [1, 1]


def test_only_rank_0_writes(windows: Tensor, tmp_path: Any) -> None:
    def work(rank: Rank, stack: LayerStack) -> None:
        evaluator = Evaluator(stack, windows, processes=rank)
        greedy_search(evaluator, [2, 3], 1, save_to=tmp_path / f"rank{rank.rank}.json")

    on_every_rank(2, work)
    assert [file.name for file in tmp_path.iterdir()] == ["rank0.json"]
