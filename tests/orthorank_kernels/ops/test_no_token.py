"""What docs/kernels.md says of positions that are no token: any negative one is as -1 to every op."""

import pytest
import torch

import orthorank_kernels as ok
from tests.orthorank_kernels.rows_tools import BACKENDS
from tests.orthorank_kernels.tools import DEVICE

NONE = (-1, -2, -(2**30))


def results(none: int, backend: str) -> list[torch.Tensor]:
    """Of every op that takes positions; the second of three is no token."""
    random = torch.Generator().manual_seed(0)

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(DEVICE)

    positions = torch.tensor([[1, none, 4]], dtype=torch.int32, device=DEVICE)
    last = positions[:, [0, 2, 1]].contiguous()  # attention takes them ascending, the unused ones behind
    h, rows, table, kv = x(1, 6, 8), x(1, 3, 8), x(1, 6, 2), x(1, 1, 6, 4)
    written, added = h.clone(), h.clone()
    ok.scatter_rows_(written, positions, rows, backend=backend)
    ok.scatter_add_rows_(added, positions, rows, rows, backend=backend)
    return [
        written,
        added,
        ok.gather_rows(h, positions, backend=backend),
        *ok.gather_add_rms_norm(h, positions, rows, None, 1e-5, backend=backend),
        ok.silu_and_mul(rows, positions=positions, backend=backend),
        ok.apply_rotary_at(x(1, 2, 3, 4), table, table, positions, rotary_dim=4, backend=backend),
        ok.sparse_query_attention(x(1, 2, 3, 4), kv, kv, last, query_offset=1, backend=backend),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_negative_position_is_no_token(backend: str) -> None:
    expected = results(-1, backend)
    assert expected[2][0, 1].eq(0).all()
    for none in NONE[1:]:
        for number, (actual, wanted) in enumerate(zip(results(none, backend), expected, strict=True)):
            assert torch.equal(actual, wanted), (none, number)
