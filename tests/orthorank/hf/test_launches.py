"""How many kernels a selected layer launches and how many bytes they move, on GPUs that are not there.

Llama-3-8B's shapes, a third of the tokens selected. The rest of a layer is matrix products, so what is counted here is
what the method itself costs. Figures and how they are counted: docs of `tests.orthorank.launches`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from orthorank import OrthoRankConfig
from orthorank.calls.context import ForwardContext
from orthorank.correction import LayerMap
from orthorank.families.known import FAMILIES
from orthorank.families.parts import Parts
from orthorank.hf.correction import corrected, normed_of
from orthorank.hf.layer import selected_forward
from orthorank.hf.selection import prepared
from orthorank_kernels import (
    add_low_rank,
    apply_rotary_at,
    gather_add_rms_norm,
    gather_rows,
    rms_norm_select,
    scatter_add_rows_,
    silu_and_mul,
    sparse_query_attention,
)
from tests.orthorank.launches import Launches
from tests.orthorank_kernels.fake_gpu import fake_gpus

pytest.importorskip("triton")

BATCH, TOKENS, HIDDEN, HEADS, KV_HEADS, WIDTH = 32, 2048, 4096, 32, 8, 14336
SELECTED, RANK = 682, 64
PLAN = OrthoRankConfig(layers=[1], keep_ratio=1 / 3)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def llama_layer() -> Any:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )
    with torch.device("cuda:0"), patch.object(torch.nn.Linear, "reset_parameters", lambda self: None):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return llama.LlamaDecoderLayer(config, layer_idx=1).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def some_map() -> LayerMap:
    return LayerMap(empty(RANK, HIDDEN), empty(HIDDEN, RANK), empty(HIDDEN))


def hugging_face_layer(
    change: Callable[[Any], Any] = lambda layer: None, padding: bool = False, with_map: bool = False
) -> Launches:
    """What `selected_forward` launches on a decoder layer of transformers."""
    call = ForwardContext(BATCH, TOKENS, past=0, prompt_tokens=TOKENS)
    with fake_gpus() as gpus, torch.no_grad():
        layer = llama_layer()
        change(layer)
        x, table = empty(BATCH, TOKENS, HIDDEN), empty(1, TOKENS, HIDDEN // HEADS)
        if padding:
            row = empty(BATCH, dtype=torch.int32)
            call = replace(call, starts=row, lengths=row, key_starts=row)
        call = prepared(call, PLAN, x.device)
        with Launches(gpus) as traced:
            parts, layer_map = Parts.of(FAMILIES["llama"], layer), some_map() if with_map else None
            result = selected_forward(parts, 1, PLAN, call, x, (table, table), layer_map=layer_map)
        assert result.shape == x.shape
    return traced


OURS = {
    "rms_norm_select": 1,
    "apply_rotary_at": 1,
    "gather_rows": 1,
    "sparse_query_attention": 1,
    "gather_add_rms_norm": 1,
    "silu_and_mul": 1,
    "scatter_add_rows_": 1,
}


def test_the_hugging_face_layer_launches_14_kernels() -> None:
    traced = hugging_face_layer()
    assert Counter(traced.names) == {"mm": 7, **OURS}
    assert len(traced.names) == 14
    # 4.8 as in the merged layer below, and 0.5 to write a copy of the hidden states: whoever captured them keeps them.
    assert traced.bytes_outside_matmuls / 1e9 == pytest.approx(5.37, abs=0.02)


def test_padding_costs_no_launch() -> None:
    """What a row's padding means is worked out once for all layers, in `prepared`."""
    assert Counter(hugging_face_layer(padding=True).names) == {"mm": 7, **OURS}


@pytest.mark.parametrize("padding", [False, True])
def test_a_map_costs_two_launches(padding: bool) -> None:
    """Of which the second writes the copy of the hidden states, so that no other op does."""
    bare, traced = (hugging_face_layer(padding=padding, with_map=with_map) for with_map in (False, True))
    assert Counter(traced.names) == Counter(bare.names) + Counter({"mm": 1, "add_low_rank": 1})
    # What the map reads: the hidden states once more, 0.54, and low-rank states of 64 numbers a token, 0.01.
    more = (traced.bytes_outside_matmuls - bare.bytes_outside_matmuls) / 1e9
    assert more == pytest.approx(0.55, abs=0.01)


def test_a_removed_layer_with_a_map_launches_3_kernels() -> None:
    with fake_gpus() as gpus, torch.no_grad():
        layer, x, layer_map = llama_layer(), empty(BATCH, TOKENS, HIDDEN), some_map()
        with Launches(gpus) as traced:
            corrected(x, normed_of(FAMILIES["llama"], layer, x), ForwardContext(BATCH, TOKENS, 0, TOKENS), layer_map)
    assert traced.names == ["rms_norm_score", "mm", "add_low_rank"]


@pytest.mark.parametrize("watched", ["mlp", "act_fn"])
def test_an_mlp_that_somebody_watches_is_called_as_it_is(watched: str) -> None:
    def watch(layer: Any) -> None:
        module = layer.mlp if watched == "mlp" else layer.mlp.act_fn
        module.register_forward_hook(lambda *given: None)

    names = Counter(hugging_face_layer(watch).names)
    assert names + Counter({"silu_and_mul": 1}) == {"mm": 7, **OURS, "silu": 1, "mul": 1}


def merged_layer(x: Tensor, w: dict[str, Tensor], sink: Tensor, workspace: Tensor, table: Tensor) -> None:
    """The layer as a serving stack would call it: merged projections, a stored sink, x updated in place."""
    heads = lambda y, n: y.view(BATCH, -1, n, HIDDEN // HEADS).transpose(1, 2)  # noqa: E731
    chosen = rms_norm_select(x, w["input_norm"], 1e-5, SELECTED, sink=sink, workspace=workspace)
    sizes = [KV_HEADS * HIDDEN // HEADS] * 2 + ([RANK] if "up" in w else [])
    keys, values, *low = linear(chosen.normed, w["kv"]).split(sizes, dim=-1)
    keys = apply_rotary_at(heads(keys, KV_HEADS), table, table)
    at = chosen.positions
    queries = heads(linear(gather_rows(chosen.normed, at), w["q"]), HEADS)
    attended = sparse_query_attention(queries, keys, heads(values, KV_HEADS), at, rotary_cos=table, rotary_sin=table)
    addend = linear(attended.transpose(1, 2).reshape(BATCH, SELECTED, HIDDEN), w["o"])
    residual, normed = gather_add_rms_norm(x, at, addend, w["pre_mlp_norm"], 1e-5)
    if low:  # `down` is further rows of the merged weight; the selected rows are read by now
        add_low_rank(x, low[0], w["up"], w["bias"], out=x)
    scatter_add_rows_(x, at, linear(silu_and_mul(linear(normed, w["gate_up"])), w["down"]), residual)


def eager_layer(x: Tensor, w: dict[str, Tensor], table: Tensor) -> Tensor:
    """Algorithm 1 in plain PyTorch, with a mask for the positions; attention is one product for the two it takes."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def turn(x: Tensor, cos: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), -1) * cos

    def heads(y: Tensor, n: int) -> Tensor:
        return y.view(BATCH, -1, n, HIDDEN // HEADS).transpose(1, 2)

    normed = norm(x, w["input_norm"])
    scores = torch.matmul(normed.narrow(1, 0, 1), normed.transpose(1, 2)).squeeze(1).abs()
    scores = torch.where(torch.arange(TOKENS, device=x.device) == 0, float("inf"), scores)
    at = torch.sort(scores.topk(SELECTED, largest=False).indices).values
    rows = at.unsqueeze(-1).expand(-1, -1, HIDDEN)
    picked, picked_normed = torch.gather(x, 1, rows), torch.gather(normed, 1, rows)
    keys, values = linear(normed, w["kv"]).split(KV_HEADS * HIDDEN // HEADS, dim=-1)
    angles = torch.gather(table.expand(BATCH, -1, -1), 1, at.unsqueeze(-1).expand(-1, -1, HIDDEN // HEADS))
    queries = turn(heads(linear(picked_normed, w["q"]), HEADS), angles.unsqueeze(1))
    keys = turn(heads(keys, KV_HEADS), table.unsqueeze(1))
    seen = torch.arange(TOKENS, device=x.device) <= at.unsqueeze(-1)
    torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(seen.logical_not(), float("-inf"))
    attended = sparse_query_attention(queries, keys, heads(values, KV_HEADS), at.to(torch.int32))
    residual = picked + linear(attended.transpose(1, 2).reshape(BATCH, SELECTED, HIDDEN), w["o"])
    gate, up = linear(norm(residual, w["pre_mlp_norm"]), w["gate_up"]).chunk(2, dim=-1)
    return x.scatter(1, rows, residual + linear(torch.nn.functional.silu(gate) * up, w["down"]))


def weights(with_map: bool = False) -> dict[str, Tensor]:
    kv = 2 * KV_HEADS * HIDDEN // HEADS + (RANK if with_map else 0)
    return {
        **({"up": empty(HIDDEN, RANK), "bias": empty(HIDDEN)} if with_map else {}),
        "input_norm": empty(HIDDEN),
        "pre_mlp_norm": empty(HIDDEN),
        "q": empty(HIDDEN, HIDDEN),
        "kv": empty(kv, HIDDEN),
        "o": empty(HIDDEN, HIDDEN),
        "gate_up": empty(2 * WIDTH, HIDDEN),
        "down": empty(HIDDEN, WIDTH),
    }


def test_merged_projections_in_place_take_12_kernels_and_fewer_bytes() -> None:
    with fake_gpus() as gpus:
        x, table, sink = empty(BATCH, TOKENS, HIDDEN), empty(1, TOKENS, HIDDEN // HEADS), empty(HIDDEN)
        w, workspace = weights(), empty(BATCH, dtype=torch.int32)
        with Launches(gpus) as fused:
            merged_layer(x, w, sink, workspace, table)
        with Launches(gpus) as eager:
            eager_layer(x, w, table)
    assert Counter(fused.names) == {"mm": 5, **OURS}
    assert len(fused.names) == 12
    assert fused.bytes_outside_matmuls / 1e9 <= 5.2
    assert fused.bytes_outside_matmuls / 1e9 == pytest.approx(4.83, abs=0.02)
    # The launches of topk, sort and masked attention are more than the one that is counted for each.
    assert len(eager.names) >= 50
    assert eager.bytes_outside_matmuls > 4 * fused.bytes_outside_matmuls


def test_with_merged_projections_a_map_costs_one_launch() -> None:
    names = []
    for with_map in (False, True):
        with fake_gpus() as gpus:
            x, table, sink = empty(BATCH, TOKENS, HIDDEN), empty(1, TOKENS, HIDDEN // HEADS), empty(HIDDEN)
            w, workspace = weights(with_map), empty(BATCH, dtype=torch.int32)
            with Launches(gpus) as traced:
                merged_layer(x, w, sink, workspace, table)
        names.append(Counter(traced.names))
    assert names[1] == names[0] + Counter({"add_low_rank": 1})


def test_a_launcher_that_fills_memory_is_seen() -> None:
    """Without a workspace, the selection fills one: a launch that no operator shows."""
    with fake_gpus() as gpus:
        x, weight = empty(BATCH, TOKENS, HIDDEN), empty(HIDDEN)
        with Launches(gpus) as traced:
            rms_norm_select(x, weight, 1e-5, SELECTED)
    assert sorted(traced.names) == ["new_zeros", "rms_norm_select"]


def test_a_launch_that_goes_around_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a launch plan, which has the compiled kernel: what no one counts must not look like what is not there."""
    from orthorank_kernels.triton import rows

    monkeypatch.setattr(rows, "launch", lambda kernel, grid, on, **arguments: None)
    with fake_gpus() as gpus:
        x, positions = empty(BATCH, TOKENS, HIDDEN), empty(BATCH, SELECTED, dtype=torch.int32)
        with Launches(gpus), pytest.raises(AssertionError, match="no launch of gather_rows was seen"):
            gather_rows(x, positions)
