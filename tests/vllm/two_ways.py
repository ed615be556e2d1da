"""Both ways of attending, on a cache that vLLM's Triton backend wrote: `python -m tests.vllm.two_ways CHECKPOINT`.

Prints, for each layout, dtype and option, how far apart the two are and how far this package's is from plain attention.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.vllm.interpreter import let_the_interpreter_be_triton

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 4, 2, 32, 16, 40
LENGTHS = [37, 1, 80]  # keys of the requests
CHOSEN = [[0, 5, 36], [], [2, 17, 63, 79]]
LAYOUTS = ("heads first", "tokens first", "spread")
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("float32", {}),
    ("float16", {}),  # bfloat16 vLLM's kernel cannot do in the interpreter, which takes its bits for integers
    ("float16", {"kv_cache_dtype": "fp8"}),
    ("float32", {"window": 20}),
    ("float32", {"logits_soft_cap": 2.0}),
)


def main(checkpoint: Path) -> None:
    """All cases."""
    let_the_interpreter_be_triton()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # which launch settings: the interpreter has none
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    found = []
    for dtype, options in CASES:
        arguments = {"kv_cache_dtype": options["kv_cache_dtype"]} if "kv_cache_dtype" in options else {}
        config = EngineArgs(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            dtype=dtype,
            block_size=BLOCK,
            max_model_len=512,
            **arguments,
        ).create_engine_config()
        for layout in LAYOUTS:
            with set_current_vllm_config(config):
                found.append({"dtype": dtype, **options, "layout": layout, **_compare(config, dtype, layout, options)})
    print(json.dumps(found))


def _compare(config: Any, dtype_name: str, layout: str, options: dict[str, Any]) -> dict[str, float]:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from orthorank.packed.selection import PackedRows
    from orthorank.packed.views import split_last
    from orthorank.serving.vllm.attention import attend_paged, attend_portable, paged_obstacle
    from orthorank.serving.vllm.backend import StepMetadata

    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    name = f"layers.0.{layout}.{len(config.compilation_config.static_forward_context)}"
    attention = Attention(
        HEADS,
        DIM,
        DIM**-0.5,
        num_kv_heads=KV_HEADS,
        cache_config=config.cache_config,
        attn_backend=TritonAttentionBackend,
        prefix=name,
        per_layer_sliding_window=options.get("window"),
        logits_soft_cap=options.get("logits_soft_cap"),
    )
    assert paged_obstacle(attention, dtype) is None
    attention.kv_cache = _cache(layout, torch.uint8 if "kv_cache_dtype" in options else dtype)
    common, keys, values = _requests(dtype)
    if "kv_cache_dtype" in options:  # vLLM's kernel writes float8 on a GPU that has it, and nowhere else
        for cache, rows in zip(split_last(attention.kv_cache, DIM, torch.float8_e4m3fn), (keys, values), strict=True):
            cache[common.slot_mapping // BLOCK, common.slot_mapping % BLOCK] = rows.to(cache.dtype)
    else:
        attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, common.slot_mapping)
    builder = TritonAttentionBackend.get_builder_cls()(
        attention.get_kv_cache_spec(config), [name], config, torch.device("cpu")
    )
    positions = torch.tensor([p for each in CHOSEN for p in each], dtype=torch.int32)
    ends = torch.tensor([0, *(len(each) for each in CHOSEN)]).cumsum(0).int()
    chosen = PackedRows(positions.clone(), positions, ends)
    queries = torch.randn(len(positions), HEADS, DIM).to(dtype)
    metadata = StepMetadata(None, common, builder.build)
    paged = attend_paged(attention, queries, chosen, metadata)
    portable = attend_portable(attention, queries, chosen, metadata)
    plain = _plain(queries, keys, values, options)
    return {"apart": _distance(paged, portable), "wrong": _distance(paged, plain)}


def _cache(layout: str, dtype: torch.dtype) -> Tensor:
    """``[blocks, kv_heads, block_size, 2 * head_dim]``, laid out as vLLM may."""
    if layout == "heads first":
        return torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * DIM, dtype=dtype)
    if layout == "tokens first":
        return torch.zeros(BLOCKS, BLOCK, KV_HEADS, 2 * DIM, dtype=dtype).transpose(1, 2)
    return torch.zeros(BLOCKS, 3, KV_HEADS, BLOCK, 2 * DIM, dtype=dtype)[:, 1]  # the blocks of three layers interleaved


def _requests(dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """Whole prompts, whose blocks lie anywhere."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    order = torch.randperm(BLOCKS - 1) + 1
    table = torch.zeros(len(LENGTHS), 8, dtype=torch.int32)
    slots = []
    for row, length in enumerate(LENGTHS):
        used = -(-length // BLOCK)
        table[row, :used], order = order[:used], order[used:]
        at = torch.arange(length)
        slots.append(table[row, at // BLOCK].long() * BLOCK + at % BLOCK)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        num_reqs=len(LENGTHS),
        num_actual_tokens=sum(LENGTHS),
        max_query_len=max(LENGTHS),
        max_seq_len=max(LENGTHS),
        block_table_tensor=table,
        slot_mapping=torch.cat(slots),
    )
    keys, values = (torch.randn(sum(LENGTHS), KV_HEADS, DIM).to(dtype) for _ in range(2))
    return common, keys, values


def _plain(queries: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention in float64, one query after another."""
    if "kv_cache_dtype" in options:
        keys, values = (x.to(torch.float8_e4m3fn) for x in (keys, values))
    owner = [row for row, each in enumerate(CHOSEN) for _ in each]
    starts = [sum(LENGTHS[:row]) for row in range(len(LENGTHS))]
    out = []
    for query, row, position in zip(queries, owner, [p for each in CHOSEN for p in each], strict=True):
        first = max(0, position + 1 - options.get("window", position + 1))
        seen = slice(starts[row] + first, starts[row] + position + 1)
        k, v = (x[seen].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
        scores = torch.einsum("hd,khd->hk", query.double(), k) * DIM**-0.5
        if cap := options.get("logits_soft_cap"):
            scores = cap * torch.tanh(scores / cap)
        out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v))
    return torch.stack(out)


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
