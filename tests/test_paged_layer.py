"""The example `examples/paged_layer.py` against the same layer computed for every token, one at a time."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.orthorank.launches import Launches
from tests.orthorank.statement import chosen
from tests.orthorank_kernels.fake_gpu import fake_gpus

HEADS, KV_HEADS, DIM, HIDDEN, WIDTH, EPS = 4, 2, 16, 48, 80, 1e-5
BLOCK_SIZE, PADDING = 16, 3
# Tokens of each sequence, and new ones in each step: prompts in two chunks, and a generated token.
LENGTHS, CHUNKS = (51, 10, 34), ((20, 9, 0), (30, 0, 33), (1, 1, 1))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "examples" / "paged_layer.py"
    spec = importlib.util.spec_from_file_location("paged_layer", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(x: torch.Tensor, value: float) -> torch.Tensor:
    """As for a graph that was captured with more tokens."""
    return torch.cat([x, x.new_full((PADDING, *x.shape[1:]), value)])


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rotary(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    cos, sin = (t.double()[0] for t in rotary(torch.tensor([position])))
    return x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin


def naive(states: torch.Tensor, sink: torch.Tensor, w: dict[str, torch.Tensor], chunks: list[tuple[int, int]]):
    """One sequence ``[tokens, hidden]`` in chunks of ``(new tokens, how many of them are selected)``."""
    normed = norm(states, w["input_norm"])
    keys, values = (normed @ w["kv"].T).unflatten(-1, (2, KV_HEADS, DIM)).unbind(1)
    keys = torch.stack([rotated(key, i) for i, key in enumerate(keys)])
    out, first = states.clone(), 0
    for new, count in chunks:
        scores = [abs(float(normed[i] @ sink)) for i in range(first, first + new)]
        for i in (first + j for j in chosen(scores, count, None if first else 0)):
            query = rotated((w["q"] @ normed[i]).view(HEADS, DIM), i)
            attended = []
            for head in range(HEADS):
                seen, of = slice(0, i + 1), head // (HEADS // KV_HEADS)
                attended.append((keys[seen, of] @ query[head] / DIM**0.5).softmax(0) @ values[seen, of])
            residual = states[i] + w["o"] @ torch.cat(attended)
            gate, up = (w["gate_up"] @ norm(residual, w["pre_mlp_norm"])).chunk(2)
            out[i] = residual + w["down"] @ (gate / (1 + (-gate).exp()) * up)
        first += new
    return out


def test_three_steps_of_three_sequences_equal_the_dense_layer_at_the_selected_tokens(example: ModuleType) -> None:
    shapes = {
        "input_norm": (HIDDEN,), "q": (HEADS * DIM, HIDDEN), "kv": (2 * KV_HEADS * DIM, HIDDEN),
        "o": (HIDDEN, HEADS * DIM), "pre_mlp_norm": (HIDDEN,), "gate_up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
    }  # fmt: skip
    w = {name: random(*shape, seed=i) * shape[-1] ** -0.5 for i, (name, shape) in enumerate(shapes.items())}
    sequences = [random(n, HIDDEN, seed=20 + i) for i, n in enumerate(LENGTHS)]
    sink = random(HIDDEN, seed=30)
    against = w["input_norm"] * sink
    # The lowest scores: first tokens would be selected, were they not the sinks; the one that begins a chunk is.
    for row in (*(x[0] for x in sequences), sequences[0][CHUNKS[0][0]]):
        row -= (row @ against) / against.square().sum() * against
    counts = [[new if new == 1 else int(0.4 * new) for new in chunk] for chunk in CHUNKS]  # decoding is dense
    doubles = {name: x.double() for name, x in w.items()}
    expected = [
        naive(x.double(), sink.double(), doubles, [(chunk[s], counts[c][s]) for c, chunk in enumerate(CHUNKS)])
        for s, x in enumerate(sequences)
    ]

    blocks = [-(-n // BLOCK_SIZE) for n in LENGTHS]
    table = torch.full((3, max(blocks) + 1), -1, dtype=torch.int32)
    order = iter(torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(9)).tolist())
    for s, n in enumerate(blocks):
        table[s, :n] = torch.tensor([next(order) for _ in range(n)])
    cache = torch.full((sum(blocks) + 2, KV_HEADS, BLOCK_SIZE, 2 * DIM), float("nan"))  # as vLLM has it
    k_cache, v_cache = cache.transpose(1, 2).split(DIM, -1)

    cached = [0, 0, 0]
    for chunk, count in zip(CHUNKS, counts, strict=True):
        positions = [torch.arange(c, c + new) for c, new in zip(cached, chunk, strict=True)]
        slots = [table[s, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in enumerate(positions)]
        cos, sin = rotary(torch.cat(positions))
        lengths = [c + new for c, new in zip(cached, chunk, strict=True)]
        step = example.Step(
            cu_seqlens=torch.tensor([0, *chunk]).cumsum(0).int(),
            cached=torch.tensor(cached, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            k=torch.tensor(count, dtype=torch.int32),
            slots=padded(torch.cat(slots).long(), -1),
            block_table=table,
            cos=padded(cos, 1.0),
            sin=padded(sin, 0.0),
            selected=sum(count) + 5,
            longest=max(lengths),
        )
        hidden_states = padded(torch.cat([x[p] for x, p in zip(sequences, positions, strict=True)]), float("nan"))
        example.selected_layer(hidden_states, sink, k_cache, v_cache, example.Weights(**w), step, EPS)
        assert hidden_states[-PADDING:].isnan().all()
        for s, rows in enumerate(hidden_states[:-PADDING].split(list(chunk))):
            wanted = expected[s][positions[s]].float()
            torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
            changed = (rows != sequences[s][positions[s]]).any(-1)
            assert int(changed.sum()) == count[s], "the selected tokens, and no others"
        cached = lengths


def test_keys_are_rotated_and_written_in_one_launch(example: ModuleType) -> None:
    """And everything else once, on a GPU that is not there."""
    pytest.importorskip("triton")

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda:0")

    with fake_gpus() as gpus:
        of_each, total = [empty(2, dtype=torch.int32) for _ in range(3)], 640
        step = example.Step(
            empty(3, dtype=torch.int32), *of_each, empty(total, dtype=torch.int64), empty(2, 32, dtype=torch.int32),
            empty(total, DIM), empty(total, DIM), selected=200, longest=500,
        )  # fmt: skip
        weights = example.Weights(
            empty(HIDDEN), empty(HEADS * DIM, HIDDEN), empty(2 * KV_HEADS * DIM, HIDDEN), empty(HIDDEN, HEADS * DIM),
            empty(HIDDEN), empty(2 * WIDTH, HIDDEN), empty(HIDDEN, WIDTH),
        )  # fmt: skip
        caches = empty(70, KV_HEADS, BLOCK_SIZE, 2 * DIM).transpose(1, 2).split(DIM, -1)
        with Launches(gpus) as traced:
            example.selected_layer(empty(total, HIDDEN), empty(HIDDEN), *caches, weights, step)
    assert [name for name in traced.names if name not in ("mm", "new_zeros", "zero_", "zeros")] == [
        "rms_norm_select", "apply_rotary_and_cache_", "gather_rows", "apply_rotary_at", "sparse_query_attention_paged",
        "gather_add_rms_norm", "silu_and_mul", "scatter_add_rows_",
    ]  # fmt: skip
    assert traced.names.count("mm") == 5
