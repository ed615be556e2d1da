"""`orthorank.packed.sinks`: what is kept, what makes room, and that nothing is computed twice."""

from collections import OrderedDict
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank import OrthoRankError
from orthorank.packed.sinks import SinkBank


class Computed:
    """States that say whose they are, and the tokens they were asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.asked: list[int] = []
        self.dtype = dtype

    def __call__(self, token: int) -> torch.Tensor:
        self.asked.append(token)
        return torch.tensor([[token, 0], [-token, 1]], dtype=self.dtype)


def assert_holds(bank: SinkBank, slots: list[int], tokens: list[int]) -> None:
    assert bank.states[slots, 0, 0].tolist() == tokens
    assert bank.states[slots, 1, 0].tolist() == [-token for token in tokens]


def test_computed_once() -> None:
    compute = Computed(torch.bfloat16)
    bank = SinkBank(compute, 3)
    slots = bank.slots([7, 5, 7, 7])
    assert slots[0] == slots[2] == slots[3] != slots[1]
    assert_holds(bank, slots, [7, 5, 7, 7])
    assert bank.slots([5, 7]) == [slots[1], slots[0]]
    assert compute.asked == [7, 5]
    assert (bank.states.shape, bank.states.dtype) == ((3, 2, 2), torch.bfloat16)


def test_the_one_not_asked_for_longest_makes_room() -> None:
    compute = Computed()
    bank = SinkBank(compute, 3)
    bank.slots([1, 2, 3])
    bank.slots([1])
    assert_holds(bank, bank.slots([4]), [4])  # 2 makes room
    assert_holds(bank, bank.slots([1, 3, 4]), [1, 3, 4])
    assert compute.asked == [1, 2, 3, 4]
    bank.slots([2])
    assert compute.asked == [1, 2, 3, 4, 2]


def test_nothing_of_a_step_makes_room_for_another_of_it() -> None:
    compute = Computed()
    bank = SinkBank(compute, 2)
    bank.slots([1, 2])
    assert_holds(bank, bank.slots([3, 1]), [3, 1])  # 1 is the oldest, and needed
    assert compute.asked == [1, 2, 3]


def test_inside_a_step_the_later_ones_stay_longer() -> None:
    """In the order of the requests, so that all ranks of a group keep the same."""
    for order in ([40, 8, 16, 1], [16, 1, 40, 8], [1, 16, 8, 40]):
        compute = Computed()
        bank = SinkBank(compute, 4)
        bank.slots([1, 8, 16, 40])
        bank.slots(order)
        compute.asked.clear()
        bank.slots([order[3], order[2], 99])  # the first of `order` makes room
        bank.slots([order[1]])
        assert compute.asked == [99]


def test_more_than_there_is_room_for() -> None:
    compute = Computed()
    bank = SinkBank(compute, 2)
    bank.slots([1, 2])
    with pytest.raises(OrthoRankError, match="3 different first tokens and the bank of sinks holds 2; give it"):
        bank.slots([1, 3, 4, 3])
    assert_holds(bank, bank.slots([1, 2]), [1, 2])
    assert compute.asked == [1, 2]


def test_room_for_one() -> None:
    compute = Computed()
    bank = SinkBank(compute, 1)
    for token in (3, 3, 4, 3):
        assert bank.slots([token, token]) == [0, 0]
        assert_holds(bank, [0], [token])
    assert compute.asked == [3, 4, 3]
    with pytest.raises(OrthoRankError, match="holds 0"):
        SinkBank(compute, 0).slots([3])


def test_before_anything_was_asked_for() -> None:
    bank = SinkBank(Computed(), 2)
    assert bank.slots([]) == []
    with pytest.raises(OrthoRankError, match="ask for the slots"):
        _ = bank.states


def test_forgotten_states_are_computed_anew() -> None:
    """By whatever the weights are then, in the order of the tokens that come, so that all ranks stay alike."""
    weight = [1.0]
    bank = SinkBank(lambda token: torch.full((1, 1), weight[0] * token), 3)
    bank.slots([5, 7])
    weight[0] = 10.0
    assert bank.states[bank.slots([5]), 0, 0].tolist() == [5.0]  # nothing says that they changed
    bank.forget()
    assert bank.slots([7, 5]) == [0, 1]
    assert bank.states[:2, 0, 0].tolist() == [70.0, 50.0]
    bank.slots([1, 2])  # makes room as before
    assert bank.states[bank.slots([2, 1, 5]), 0, 0].tolist() == [20.0, 10.0, 50.0]


def test_a_computation_that_fails_leaves_the_bank_as_it_was() -> None:
    fails = [2]

    def compute(token: int) -> torch.Tensor:
        if token in fails:
            raise RuntimeError("out of memory")
        return torch.full((1, 1), float(token))

    bank = SinkBank(compute, 2)
    bank.slots([1])
    with pytest.raises(RuntimeError):
        bank.slots([2])
    fails.clear()
    slots = bank.slots([1, 2])
    assert bank.states[slots, 0, 0].tolist() == [1, 2]


def test_what_a_step_brings_is_computed_at_once() -> None:
    """The same slots as one by one; a computation that fails leaves the bank as it was."""
    asked: list[list[int]] = []

    def compute(tokens: list[int]) -> torch.Tensor:
        asked.append(tokens)
        if 13 in tokens:
            raise RuntimeError("out of memory")
        return torch.stack([Computed()(token) for token in tokens])

    bank, single = SinkBank(compute, 4, batched=True), SinkBank(Computed(), 4)
    for step in ([7, 5, 7], [5, 9, 8], [], [5], [6, 3, 9, 6]):
        assert bank.slots(step) == single.slots(step)
        assert_holds(bank, bank.slots(step), step)
    assert asked == [[7, 5], [9, 8], [6, 3]]
    with pytest.raises(RuntimeError):
        bank.slots([2, 13])
    assert_holds(bank, bank.slots([6, 3, 9]), [6, 3, 9])
    assert len(asked) == 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=12), st.integers(4, 6))
def test_as_a_plain_lru(steps: list[list[int]], capacity: int) -> None:
    compute = Computed()
    bank, kept, expected = SinkBank(compute, capacity), OrderedDict[int, None](), []
    for tokens in steps:
        wanted = dict.fromkeys(tokens)
        missing = [token for token in wanted if token not in kept]
        for token in wanted:
            if token in kept:
                kept.move_to_end(token)
        room = max(0, len(kept) + len(missing) - capacity)
        for token in list(islice(kept, room)):
            del kept[token]
        kept.update(dict.fromkeys(missing))
        expected += missing
        slots = bank.slots(tokens)
        assert compute.asked == expected
        if tokens:
            assert_holds(bank, slots, tokens)
