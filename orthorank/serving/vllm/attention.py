"""Attention of the chosen rows to vLLM's cache, and what is written there: by this package's kernels or the backend."""

from typing import Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.packed import views
from orthorank.packed.selection import PackedRows
from orthorank.serving.vllm import hooks
from orthorank.serving.vllm.backend import StepMetadata
from orthorank.serving.vllm_interface.interface import OBJECTS, expect
from orthorank_kernels import apply_rotary_and_cache_, sparse_query_attention_paged

# Backends whose cache is [blocks, kv_heads, block_size, 2 * head_dim], keys before values in the last axis.
KNOWN_LAYOUTS = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
# Modules whose backends write keys and values to a cache of their dtype as they are.
PLAIN_WRITERS = tuple(f"vllm.v1.attention.backends.{name}" for name in ("flash_attn", "triton_attn", "flashinfer"))


def backend_obstacle(backend: Any) -> str | None:
    """Why selecting layers cannot have this attention backend of vLLM, or None."""
    other = "choose another one with --attention-backend, such as TRITON_ATTN"
    if backend.forward_includes_kv_cache_update:
        return (
            f"the attention backend {backend.get_name()} writes keys and values as it attends, so those of unselected "
            f"tokens would be lost; {other}"
        )
    if backend.get_name() == "FLEX_ATTENTION":
        return (
            "the attention backend FLEX_ATTENTION has room for --max-num-seqs requests in a step, and each selected "
            f"token would be one; {other}"
        )
    return None


def paged_obstacle(attention: Any, dtype: torch.dtype) -> str | None:
    """Why the package's kernel cannot read the cache of ``attention``, or None."""
    name, cache = attention.attn_backend.get_name(), attention.kv_cache_dtype
    if name not in KNOWN_LAYOUTS:
        return f"the backend {name} keeps its cache in a layout of its own; known are {', '.join(KNOWN_LAYOUTS)}"
    if cache not in ("auto", str(dtype).removeprefix("torch."), *views.FP8):
        return f"the cache's dtype is {cache}; the kernel reads that of the model and {', '.join(views.FP8)}"
    if cache in views.FP8 and not hooks.has_ocp_fp8():
        return "this device's float8 has other special values (fnuz), which the kernel does not read"
    if getattr(attention.impl, "alibi_slopes", None) is not None:
        return "the model has ALiBi slopes"
    return None


def attend_paged(attention: Any, queries: Tensor, chosen: PackedRows, metadata: StepMetadata) -> Tensor:
    """Attention by `sparse_query_attention_paged`, over the cache where it is.

    Args:
        attention: vLLM's attention layer; queries: ``[n, heads, head_dim]``, rotated.

    Returns:
        ``[n, heads, head_dim]``.
    """
    common, impl = metadata.common, attention.impl
    fp8 = views.FP8.get(attention.kv_cache_dtype)
    keys, values = views.split_last(attention.kv_cache, attention.head_size, fp8)
    scales = {} if fp8 is None else {"k_scale": attention._k_scale, "v_scale": attention._v_scale}
    return sparse_query_attention_paged(
        queries,
        keys,
        values,
        chosen.positions,
        chosen.cu_selected,
        common.block_table_tensor[: common.num_reqs],
        common.seq_lens[: common.num_reqs],
        max_seqlen_k=common.max_seq_len,
        scale=impl.scale,
        window=attention.sliding_window,
        softcap=getattr(impl, "logits_soft_cap", None) or None,
        sinks=getattr(impl, "sinks", None),
        **scales,
    )


def attend_portable(attention: Any, queries: Tensor, chosen: PackedRows, metadata: StepMetadata) -> Tensor:
    """Attention by the backend's own kernel, whatever its cache looks like.

    Each query becomes a request of one token, whose keys end at its position and whose blocks are its owner's. That is
    exact on every backend and costs what decoding so many tokens costs: queries do not share keys that were read.
    """
    common = metadata.common
    count = queries.shape[0]
    owner = _request_of(chosen, count)
    positions = chosen.positions.clamp(min=0)  # rows that are not there read one key, and no result uses them
    starts = torch.arange(count + 1, dtype=torch.int32)
    rows = common.replace(
        query_start_loc=starts.to(queries.device, non_blocking=True),
        query_start_loc_cpu=starts,
        seq_lens=positions + 1,
        num_reqs=count,
        num_actual_tokens=count,
        max_query_len=1,
        block_table_tensor=common.block_table_tensor.index_select(0, owner),
        positions=positions.long(),
        is_prefilling=None,
        seq_lens_cpu_upper_bound=torch.full((count,), common.max_seq_len, dtype=torch.int32),
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    out = torch.empty_like(queries)
    attention.impl.forward(
        attention, queries, None, None, attention.kv_cache, metadata.build(0, rows, fast_build=True), output=out
    )
    return out


def writes_plainly(attention: Any, dtype: torch.dtype) -> bool:
    """Whether the backend's update of the cache that `attend_paged` reads is that write and nothing else."""
    update = getattr(type(attention.impl), "do_kv_cache_update", None)
    return (
        getattr(update, "__module__", None) in PLAIN_WRITERS
        and attention.kv_cache.dtype == dtype
        and getattr(attention, "kv_sharing_target_layer_name", None) is None
        and getattr(attention.impl, "attn_type", "decoder") == "decoder"
    )


def write_rotated(attention: Any, keys: Tensor, values: Tensor, positions: Tensor, rotation: dict[str, Any]) -> None:
    """The backend's update of its cache, of keys that are not rotated yet: in one launch.

    Args:
        keys, values: ``[tokens, kv_heads, head_dim]``; positions: int64 ``[tokens]``; rotation: of `Projections`.
    """
    slots = hooks.slots_of(attention)
    count = min(slots.shape[0], keys.shape[0])  # either may be padded
    slots, keys, values, positions = (x if x.shape[0] == count else x[:count] for x in (slots, keys, values, positions))
    k_cache, v_cache = views.split_last(attention.kv_cache, attention.head_size)
    apply_rotary_and_cache_(k_cache, v_cache, slots, keys, values, positions=positions, **rotation)


def choose_way(wanted: str, attention: Any, dtype: torch.dtype) -> bool:
    """Whether `attend_paged` is the way, for the serving option ``attention``.

    Raises:
        OrthoRankError: it is asked for and cannot be.
    """
    obstacle = paged_obstacle(attention, dtype)
    if attention.kv_cache_dtype in views.FP8:
        expect(attention, **OBJECTS["attention with a float8 cache"])
    if wanted == "paged" and obstacle is not None:
        raise OrthoRankError(f"attention is 'paged', and {obstacle}; use 'auto' or 'portable'")
    return wanted != "portable" and obstacle is None


def _request_of(chosen: PackedRows, count: int) -> Tensor:
    """The request of each chosen row: int32 ``[count]``."""
    places = torch.arange(count, dtype=torch.int32, device=chosen.rows.device)
    owner = torch.searchsorted(chosen.cu_selected[1:].contiguous(), places, right=True)
    return owner.clamp(max=chosen.cu_selected.shape[0] - 2)
