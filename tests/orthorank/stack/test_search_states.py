"""Which states are kept within a budget, and which are given up for others."""

import torch
from torch import Tensor

from orthorank.stack.resources import Ratios, States

DENSE: Ratios = (1.0,) * 6
ONE = 40  # bytes of a state


def state(value: float) -> Tensor:
    return torch.full((10,), float(value))


def switched(*layers: int) -> Ratios:
    return tuple(0.5 if layer in layers else 1.0 for layer in range(6))


def longest(states: States, ratios: Ratios) -> int | None:
    found = states.longest(ratios)
    return None if found is None else found[0]


def test_the_longest_prefix_is_found() -> None:
    states = States(10 * ONE)
    assert states.longest(DENSE) is None
    for layer in (2, 4):
        states.offer(DENSE[:layer], state(layer))
    states.offer(switched(1)[:3], state(3))
    for ratios, layer in ((DENSE, 4), (switched(5), 4), (switched(3), 2), (switched(1), 3), (switched(1, 2), None)):
        found = states.longest(ratios)
        assert (found and found[0]) == layer
        assert found is None or bool((found[1] == layer).all())
    assert longest(states, switched(2)) == 2
    assert longest(states, DENSE[:3]) == 2, "no state above what is asked for"


def test_states_that_no_next_plan_can_use_are_dropped() -> None:
    """After layer 3 was chosen: what lies above it without it is of no plan to come."""
    states = States(100 * ONE)
    states.follow(DENSE, base=1)
    for ratios in (DENSE, switched(1), switched(3), switched(4)):
        for layer in (1, 2, 3, 4, 5):
            states.offer(ratios[:layer], state(layer))
    assert states.bytes == (5 + 4 + 2 + 1) * ONE, "a state is kept once, whatever plan it was computed for"
    states.follow(switched(3), base=1)
    # dense up to 5, which differs from the plan in layer 3; 1 switched up to 3; 3 switched; of 4 switched only what
    # is dense: switched without 3 it differs in two layers, like 1 switched above 3
    assert states.bytes == (5 + 2 + 2) * ONE
    assert [longest(states, switched(*more)) for more in ((3,), (1, 3), (3, 4), (4,))] == [5, 3, 4, 4]


def test_the_trunk_takes_the_room_of_branches() -> None:
    states = States(3 * ONE)
    states.follow(DENSE, base=1)
    states.offer(DENSE[:1], state(1))
    states.offer(switched(1)[:2], state(2))
    states.offer(switched(1)[:3], state(3))
    states.offer(switched(2)[:3], state(3))
    assert longest(states, switched(2)) == 1, "a branch takes free room only"
    assert longest(states, switched(1)) == 3
    states.offer(DENSE[:2], state(2))
    states.offer(DENSE[:3], state(3))
    assert longest(states, DENSE) == 3
    assert longest(states, switched(1)) == 1
    assert states.bytes == 3 * ONE


def test_of_the_trunk_the_one_used_longest_ago_goes_but_never_the_base() -> None:
    states = States(3 * ONE)
    states.follow(DENSE, base=1)
    for layer in (1, 2, 3):
        states.offer(DENSE[:layer], state(layer))
    assert longest(states, switched(2)) == 2, "used: now 3 is the one used longest ago, apart from the base"
    states.offer(DENSE[:4], state(4))
    assert [longest(states, DENSE[:layer]) for layer in (1, 2, 3, 4)] == [1, 2, 2, 4]
    for layer in (5, 6, 3):
        states.offer(DENSE[:layer], state(layer))
        assert longest(states, DENSE[:1]) == 1


def test_what_does_not_fit_is_not_kept_and_drives_nothing_out() -> None:
    states = States(2 * ONE)
    states.follow(DENSE, base=1)
    states.offer(DENSE[:1], state(1))
    states.offer(DENSE[:2], state(2))
    states.offer(DENSE[:3], torch.zeros(21))
    assert [longest(states, DENSE[:layer]) for layer in (1, 2, 3)] == [1, 2, 2]
    assert states.bytes == 2 * ONE


def test_states_that_are_views_hold_no_more_than_they_show() -> None:
    states, large = States(budget=1000), torch.zeros(100, 8)
    states.offer((1.0,), large[3])
    found = states.longest((1.0,))
    assert found is not None
    assert found[1].untyped_storage().nbytes() == states.bytes == 32
