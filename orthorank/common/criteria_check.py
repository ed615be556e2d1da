"""What a criterion must keep to, tried on random states when it is registered."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError

LENGTHS = (5, 1, 12, 8)  # tokens of the rows that are tried
HEADS, HEAD_DIM, LAYER, SEED = 2, 16, 3, 7
TOLERANCE = 1e-4  # of the largest value; what sums in another order leave is far below it


def check_rows(
    name: str, values: Callable[..., Tensor], pointwise: bool, needs: Sequence[str], hidden_size: int
) -> None:
    """A row alone gives what it gives in a padded batch, and, of what is pointwise, a token what it gives alone.

    Args:
        values: the criterion ``name``; the others as for `orthorank.common.criteria.register_criterion`.

    Raises:
        OrthoRankError: it does not, or the function fails or changes its arguments.
    """
    for side in ("left", "right"):
        batch, spans = _batch(needs, hidden_size, side)
        together = _values(name, values, batch)
        for row, span in enumerate(spans):
            alone = _values(name, values, _part(batch, row, span))
            if (worst := _difference(together[row, span], alone[0])) > TOLERANCE:
                raise OrthoRankError(
                    f"criterion {name!r} gives a row of {LENGTHS[row]} tokens other values alone than in a "
                    f"batch with padding on the {side}: they differ by {worst:.2g} of the largest; leave out what is "
                    "not valid, in sums and means over tokens, too, and look at no other row"
                )
            for token in range(span.start, span.stop) if pointwise else ():
                single = _values(name, values, _part(batch, row, slice(token, token + 1)))
                if (worst := _difference(together[row, token : token + 1], single[0])) > TOLERANCE:
                    raise OrthoRankError(
                        f"criterion {name!r} is said to be pointwise, and gives a token another value alone "
                        f"than among others: they differ by {worst:.2g}; register it with pointwise=False"
                    )


def _batch(needs: Sequence[str], hidden_size: int, side: str) -> tuple[dict[str, Any], list[slice]]:
    """Arguments for rows of `LENGTHS`, and where their tokens are. Padding is large, so that it is noticed."""
    numbers = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    rows, tokens = len(LENGTHS), max(LENGTHS)
    spans = [slice(tokens - n, tokens) if side == "left" else slice(0, n) for n in LENGTHS]
    valid = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, span in enumerate(spans):
        valid[row, span] = True
    loud = torch.where(valid, 1.0, 50.0)
    x, sink = random(rows, tokens, hidden_size) * loud[:, :, None], random(rows, hidden_size)
    for row, span in enumerate(spans[::2]):  # of the others, the sink came in an earlier chunk
        sink[2 * row] = x[2 * row, span.start]
    heads = loud[:, None, :, None]
    there: dict[str, Any] = {
        "scores": (x * sink[:, None]).sum(-1).abs(),
        "keys": random(rows, HEADS, tokens, HEAD_DIM) * heads,
        "queries": random(rows, 2 * HEADS, tokens, HEAD_DIM) * heads,
        "sink_keys": random(rows, HEADS, HEAD_DIM),
        "sink_queries": random(rows, 2 * HEADS, HEAD_DIM),
        "positions": torch.arange(tokens)[None] - torch.tensor([span.start for span in spans])[:, None],
        "layer": LAYER,
        "seed": SEED,
    }
    return {"x": x, "sink": sink, "valid": valid} | {name: there[name] for name in needs}, spans


def _part(batch: dict[str, Any], row: int, span: slice) -> dict[str, Any]:
    """The arguments of some tokens of one row alone."""

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = value[row : row + 1]
        if name in ("keys", "queries"):
            return own[:, :, span]
        return own[:, span] if name in ("x", "valid", "scores", "positions") else own

    return {name: part(name, value) for name, value in batch.items()}


@torch.no_grad()
def _values(name: str, values: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    try:
        needed = {key: value for key, value in given.items() if key not in ("x", "sink", "valid")}
        found = values(given["x"], given["sink"], given["valid"], **needed)
    except OrthoRankError:
        raise
    except Exception as error:
        shapes = {key: list(value.shape) for key, value in arguments.items() if isinstance(value, Tensor)}
        raise OrthoRankError(
            f"criterion {name!r} fails with {type(error).__name__}: {error} (tried with {shapes})"
        ) from error
    for key, value in arguments.items():
        if isinstance(value, Tensor) and not torch.equal(given[key], value):
            raise OrthoRankError(f"criterion {name!r} writes into {key}, which the layer goes on with; copy it")
    return found


def _difference(values: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest value; infinite where one is not a number and the other is."""
    values, expected = values.double(), expected.double()
    same = (values == expected) | (values.isnan() & expected.isnan())
    scale = max(1e-30, float(expected.nan_to_num(0, 0, 0).abs().max()))
    return float(torch.where(same, 0.0, (values - expected).abs() / scale).nan_to_num(torch.inf).max())
