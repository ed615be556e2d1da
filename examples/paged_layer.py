"""A selected Llama layer over a paged cache, as a serving stack runs it: PyTorch and these kernels, nothing else.

Packed layout: the new tokens of all sequences lie one after another. Every token gets its keys and values; the selected
ones alone get queries, attention and MLP. No value is read on the host, so the whole layer can be captured in a graph.
"""

import argparse
from dataclasses import dataclass

if __name__ == "__main__":  # before the imports below, which take seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

import torch

import orthorank_kernels as ok


@dataclass
class Weights:
    """Of one layer, merged as serving stacks keep them: kv = [k; v], gate_up = [gate; up]."""

    input_norm: torch.Tensor  # [hidden]
    q: torch.Tensor  # [heads * head_dim, hidden]
    kv: torch.Tensor  # [2 * kv_heads * head_dim, hidden]
    o: torch.Tensor  # [hidden, heads * head_dim]
    pre_mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * width, hidden]
    down: torch.Tensor  # [hidden, width]


@dataclass
class Step:
    """What the stack knows of this step; everything but `selected` and `longest` is on the device."""

    cu_seqlens: torch.Tensor  # int32 [seqs + 1], where each sequence's new tokens begin
    cached: torch.Tensor  # int32 [seqs], tokens of each sequence that are in the cache already
    seq_lens: torch.Tensor  # int32 [seqs], cached and new
    k: torch.Tensor  # int32 [seqs], how many to select in each
    slots: torch.Tensor  # [total], block * block_size + offset of each new token; of padding: -1
    block_table: torch.Tensor  # int32 [seqs, max_blocks]
    cos: torch.Tensor  # [total, head_dim], rotary tables at each token's position
    sin: torch.Tensor
    selected: int  # at least the sum of k
    longest: int  # at least the largest of seq_lens


def selected_layer(
    hidden_states: torch.Tensor,  # [total, hidden], updated in place
    sink: torch.Tensor,  # [hidden], the sink's normed state at this layer: a constant of the model
    k_cache: torch.Tensor,  # [blocks, block_size, kv_heads, head_dim], written in place
    v_cache: torch.Tensor,
    w: Weights,
    step: Step,
    eps: float = 1e-5,
) -> None:
    kv_heads, head_dim = k_cache.shape[2:]
    chosen = ok.rms_norm_select(
        hidden_states, w.input_norm, eps, step.k, sink=sink, cu_seqlens=step.cu_seqlens, position_offsets=step.cached,
        max_selected=step.selected,
    )  # fmt: skip
    keys, values = (chosen.normed @ w.kv.T).unflatten(-1, (2 * kv_heads, head_dim)).split(kv_heads, 1)
    ok.apply_rotary_and_cache_(k_cache, v_cache, step.slots, keys, values, step.cos, step.sin)

    queries = (ok.gather_rows(chosen.normed, chosen.rows) @ w.q.T).unflatten(-1, (-1, head_dim))
    queries = ok.apply_rotary_at(queries, step.cos, step.sin, chosen.rows)
    attended = ok.sparse_query_attention_paged(
        queries, k_cache, v_cache, chosen.positions, chosen.cu_selected, step.block_table, step.seq_lens,
        max_seqlen_k=step.longest,
    )  # fmt: skip
    residual, normed = ok.gather_add_rms_norm(
        hidden_states, chosen.rows, attended.flatten(1) @ w.o.T, w.pre_mlp_norm, eps
    )
    updates = ok.silu_and_mul(normed @ w.gate_up.T) @ w.down.T
    ok.scatter_add_rows_(hidden_states, chosen.rows, updates, residual)
