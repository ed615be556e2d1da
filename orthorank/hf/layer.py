"""The selected layer: one forward for every family (paper, Algorithm 1).

h [tokens, hidden] --rms_norm_select--> x [tokens, hidden], positions [k]
x --k_proj, v_proj--> K, V of all tokens --rotary--> cache
x --gather_rows--> x_sel --q_proj--> Q of the selected
Q, K, V, positions --sparse_query_attention, which rotates Q--> o --o_proj--> a
h, positions, a --gather_add_rms_norm--> r = h[positions] + a, y = norm(r)
y --mlp--> m;   h' --scatter_add_rows_--> r + m at positions (h' began as a copy of h, or as what a map made of it)

Where families differ (norms, projections, rotary embedding, what the MLP reads), `Parts` knows.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calls.context import ForwardContext
from orthorank.config import OrthoRankConfig
from orthorank.families.norm import Norm
from orthorank.families.parts import Parts
from orthorank.hf import cache_state as sink_state
from orthorank.hf import selection
from orthorank.hf.ablations import attention_among_selected
from orthorank.hf.criteria import Chosen, norm_and_select, scored_states
from orthorank_kernels import gather_rows, scatter_add_rows_, sparse_query_attention

if TYPE_CHECKING:
    from orthorank.correction import LayerMap


def selected_forward(
    parts: Parts,
    index: int,
    config: OrthoRankConfig,
    call: ForwardContext,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cache: Any = None,
    updated: list[int | Tensor] | None = None,
    layer_map: "LayerMap | None" = None,
) -> Tensor:
    """One decoder layer in which only the selected tokens are updated.

    Args:
        parts: the layer's modules; index: its number, which names its entry in ``cache``.
        config: the plan; call: what is prompt and what is padding.
        hidden_states: ``[batch, tokens, hidden]``. Left as it is: a caller that captured it keeps the right values.
        position_embeddings: cos and sin, ``[batch or 1, tokens, rotary_dim]``.
        cache: a transformers cache, which gets the keys and values of all tokens, or None. None with ``kv="selected"``.
        updated: gets how many tokens are updated, at its end.
        layer_map: what the plan adds to unselected tokens, on the layer's device, or None.

    Returns:
        ``[batch, tokens, hidden]``: unselected tokens as they came, or as ``layer_map`` corrects them.
    """
    tables = parts.tables(position_embeddings)
    copy = layer_map is None  # else adding the map makes it
    normed, positions, written, counts = _norm_and_select(parts, index, config, call, hidden_states, cache, copy)
    if updated is not None:
        updated.append(selection.count_of(config, index, call, positions, counts))
    positions = selection.fitted(config, call, positions, counts)
    if layer_map is not None:
        from orthorank.hf.correction import corrected  # corrected plans alone need it

        written = corrected(hidden_states, normed, call, layer_map)

    if call.watcher is not None:
        call.watcher(index, positions, call)

    first_key = 0
    if config.kv == "all":
        keys, values = parts.keys_and_values(normed)
        keys = parts.rotate(keys, tables)
        if cache is not None:
            _, first_key = cache.get_mask_sizes(call.tokens, index)  # the column of the first key that update returns
            if isinstance(first_key, Tensor):  # transformers 5.16, after a crop by a number in a tensor
                first_key = int(first_key)
            keys, values = cache.update(keys, values, index)
    if positions.shape[1] == 0:
        return written

    selected = gather_rows(normed, positions)
    queries = parts.queries(selected)
    options: dict[str, Any] = {"scale": parts.attention.scaling, "softcap": parts.softcap, "window": parts.window}
    options["sinks"] = parts.sinks
    if config.kv == "all":
        attn_out = sparse_query_attention(
            queries,
            keys,
            values,
            positions,
            starts=call.key_starts if call.key_starts is None or first_key == 0 else call.key_starts - first_key,
            query_offset=call.past - first_key,
            **parts.rotation(tables),
            **options,
        )
    else:
        keys, values = parts.keys_and_values(selected)
        queries, keys = (parts.rotate(heads, tables, positions) for heads in (queries, keys))
        attn_out = attention_among_selected(queries, keys, values, positions, tokens=call.tokens, **options)
    addend = parts.output(attn_out).to(hidden_states.dtype)  # autocast may have made it another
    residual, mlp_in = parts.add_and_norm(hidden_states, positions, addend, selected)
    rows = parts.feed_forward(mlp_in).to(residual.dtype)
    scatter_add_rows_(written, positions, rows, residual, scale=parts.residual_scale)
    return written


def _norm_and_select(
    parts: Parts,
    index: int,
    config: OrthoRankConfig,
    call: ForwardContext,
    hidden_states: Tensor,
    cache: Any,
    copy: bool,
) -> Chosen:
    """The layer's input norm of all tokens, the selected positions, and a copy of the input to write the result into.

    Stores the sinks' states with the cache.
    """
    states = partial(_scored, config, parts.input_norm)
    sink = None if call.first else sink_state.continued(call, cache, index, hidden_states, states)
    with parts.input_norm.applied(hidden_states) as (normed, norm):
        chosen = norm_and_select(config, index, call, hidden_states, norm, sink, normed, parts, copy)
    if cache is not None:
        scored = scored_states(config, hidden_states, chosen.normed)
        sink_state.keep(cache, index, sink_state.rows_at(scored, call.starts) if sink is None else sink)
    return chosen


def _scored(config: OrthoRankConfig, norm: Norm, rows: Tensor) -> Tensor:
    return scored_states(config, rows, norm(rows))


def keep_sinks(
    norm: Norm, index: int, config: OrthoRankConfig, call: ForwardContext, hidden_states: Tensor, cache: Any
) -> None:
    """Store the sinks' states of a call whose prompts are too short to select from.

    A later one may go on with the cache, when they have become longer.

    Args:
        norm: before the layer's attention; the others as for `selected_forward`.
    """
    states = partial(_scored, config, norm)
    if call.first:
        sink_state.keep(cache, index, states(sink_state.rows_at(hidden_states, call.starts)))
    elif index in getattr(cache, sink_state.ATTRIBUTE, {}):
        sink_state.keep(cache, index, sink_state.continued(call, cache, index, hidden_states, states))


def removed_forward(index: int, hidden_states: Tensor, cache: Any) -> Tensor:
    """A layer of a plan with keep_ratio 0: nothing is computed.

    Models read how many tokens are cached from the first layer of each kind (full, sliding), some layers of a cache
    cannot be cropped before they hold something, and an offloading cache brings in a layer when the one before it is
    updated. There, a stand-in of one head and one channel keeps the count.
    """
    if _needs_stand_in(cache, index):
        batch, tokens = hidden_states.shape[:2]
        heads, channels = _stand_in_shape(cache, index)
        stand_in = hidden_states.new_zeros(batch, heads, tokens, channels)
        cache.update(stand_in, stand_in, index)
    return hidden_states


def _stand_in_shape(cache: Any, index: int) -> tuple[int, int]:
    """Heads and channels: of a cache layer that was allocated ahead of time; else 1, and what can be quantised."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    keys = getattr(layer, "keys", None)
    if isinstance(keys, Tensor) and keys.dim() == 4:
        return keys.shape[1], keys.shape[3]
    return 1, getattr(layer, "q_group_size", 1)


def _needs_stand_in(cache: Any, index: int) -> bool:
    if getattr(cache, "offloading", False):
        return True
    sliding: list[bool] = list(cache.is_sliding)
    if index >= len(sliding):  # a cache without a config grows a layer at the first update, and all are alike
        return index == 0
    return sliding[index] or sliding.index(False) == index or not _crops_empty_layers()


@torch.compiler.assume_constant_result
def _crops_empty_layers() -> bool:
    """Whether a layer of a growing cache can be cropped before its first update; not in transformers 5.16."""
    from transformers.cache_utils import DynamicLayer

    try:
        DynamicLayer().crop(-1)
    except TypeError:
        return False
    return True
