"""A serving engine as small as can be: requests packed into steps, a paged cache of plain tensors, a real tiny model.

Selecting layers run as `packed_forward`; dense layers run here, on all tokens, with the model's own modules.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from orthorank import OrthoRankConfig
from orthorank.packed import map_of, views
from orthorank.packed.layer import PackedParts, RMSNorm, packed_forward
from orthorank.packed.selection import PackedRows
from orthorank.packed.sinks import SinkBank
from orthorank.packed.steps import Step, make_step
from orthorank_kernels import gather_rows, sparse_query_attention_paged

BLOCK_SIZE = 16


@dataclass
class Request:
    """All tokens that will ever be computed, how many of them are prompt, and how many are computed."""

    tokens: list[int]
    prompt: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """The tokens of one step."""

    step: Step
    positions: Tensor  # int64 [tokens]
    block_table: Tensor  # int32 [requests, blocks]
    seq_lens: Tensor  # int32 [requests]

    def slots(self) -> tuple[Tensor, Tensor]:
        """Block and place in it of every token."""
        lengths = self.step.cu_tokens.diff().long()
        owner = torch.arange(self.step.requests).repeat_interleave(lengths)
        return self.block_table[owner, self.positions // BLOCK_SIZE].long(), self.positions % BLOCK_SIZE


class LayerParts(PackedParts):
    """A decoder layer of transformers and its part of the cache."""

    def __init__(self, model: Any, index: int, cache: Tensor, batch: Batch, sinks: Tensor | None) -> None:
        self.layer, self.attention = model.model.layers[index], model.model.layers[index].self_attn
        self.rotary, self.batch, self.states = model.model.rotary_emb, batch, sinks
        self.keys, self.values = views.split_last(cache, self.attention.head_dim)
        self.chosen: PackedRows | None = None
        self.down: Tensor | None = None  # rides in the product that gives the keys

    @property
    def input_norm(self) -> RMSNorm:
        return RMSNorm(self.layer.input_layernorm.weight, self.layer.input_layernorm.variance_epsilon)

    @property
    def pre_mlp_norm(self) -> RMSNorm:
        norm = self.layer.post_attention_layernorm
        return RMSNorm(norm.weight, norm.variance_epsilon)

    def sinks(self, step: Step) -> Tensor:
        assert self.states is not None
        return self.states[step.sink_slots]

    def project(self, normed: Tensor) -> Tensor | None:
        x, at = normed[: self.batch.step.tokens], self.batch.slots()
        self.keys[at] = self._rotated(self._heads("k", x), self.batch.positions)
        self.values[at] = self._heads("v", x)
        return (
            None
            if self.down is None
            else linear(x, torch.cat([self.attention.k_proj.weight, self.down]))[:, -len(self.down) :]
        )

    def attend(self, normed: Tensor, chosen: PackedRows) -> Tensor:
        self.chosen = chosen
        queries = self._heads("q", gather_rows(normed, chosen.rows))
        attended = sparse_query_attention_paged(
            self._rotated(queries, chosen.positions.clamp(min=0).long()),
            self.keys,
            self.values,
            chosen.positions,
            chosen.cu_selected,
            self.batch.block_table,
            self.batch.seq_lens,
        )
        return self.attention.o_proj(attended.flatten(1))

    def feed_forward(self, fed: Tensor) -> Tensor:
        return self.layer.mlp(fed)

    def _heads(self, which: str, x: Tensor) -> Tensor:
        heads = getattr(self.attention, f"{which}_proj")(x).unflatten(-1, (-1, self.attention.head_dim))
        norm = getattr(self.attention, f"{which}_norm", None)
        return heads if norm is None else norm(heads)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (table[0][:, None] for table in self.rotary(x, positions[None]))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass
class Ran:
    """What a selecting layer was given and gave: copies from before, and the tensors themselves from after."""

    layer: int
    step: Step
    hidden: Tensor
    residual: Tensor
    before: tuple[Tensor, Tensor]
    out_hidden: Tensor
    out_residual: Tensor
    chosen: PackedRows | None  # None: nothing


class Engine:
    """Runs requests step by step.

    Args:
        model: of transformers; plan: which layers select; read_count: as in `packed_forward`; padding: rows of NaN
            behind the last request; capacity: of the bank of sinks; merged: whether the down products of maps ride in
            others.
    """

    def __init__(
        self,
        model: Any,
        plan: OrthoRankConfig,
        *,
        read_count: bool = True,
        padding: int = 0,
        capacity: int = 4,
        merged: bool = False,
    ) -> None:
        self.model, self.plan, self.read_count, self.padding, self.merged = model, plan, read_count, padding, merged
        config, weight = model.config, model.lm_head.weight
        self.maps = [map_of(plan, i, weight.device, weight.dtype) for i in range(config.num_hidden_layers)]
        shape = (config.num_key_value_heads, BLOCK_SIZE, 2 * config.head_dim)
        self.caches = [torch.full((64, *shape), torch.nan, dtype=weight.dtype) for _ in model.model.layers]
        self.free = torch.randperm(64, generator=torch.Generator().manual_seed(5)).tolist()
        self.bank = SinkBank(self._sink, capacity)
        self.ran: list[Ran] = []

    @torch.no_grad()
    def run(self, *chunks: tuple[Request, int]) -> list[Tensor]:
        """One step, so many tokens of each request. The last hidden states of each."""
        batch = self._batch(chunks)
        ids = [token for request, count in chunks for token in request.tokens[request.computed :][:count]]
        hidden, residual = self.model.model.embed_tokens(torch.tensor(ids, dtype=torch.int64)), None
        for index in range(len(self.caches)):
            ratio = self.plan.ratio(index)
            if ratio == 0 and self.maps[index] is not None:
                residual = torch.zeros_like(hidden) if residual is None else residual
                hidden, residual = self._selecting(index, batch, hidden, residual)
            elif residual is not None and 0 < ratio < 1:
                hidden, residual = self._selecting(index, batch, hidden, residual)
            elif ratio > 0:
                hidden, residual = self._dense(index, batch, hidden, residual)
        for request, count in chunks:
            request.computed += count
        assert residual is not None
        return list(self.model.model.norm(hidden + residual).split([count for _, count in chunks]))

    def preempt(self, request: Request) -> None:
        """Forget what was computed."""
        self.free += request.blocks
        request.blocks, request.computed = [], 0

    def _batch(self, chunks: tuple[tuple[Request, int], ...]) -> Batch:
        starts, ends = [0], [request.computed + count for request, count in chunks]
        for (request, count), end in zip(chunks, ends, strict=True):
            while len(request.blocks) * BLOCK_SIZE < end:
                request.blocks.append(self.free.pop())
            starts.append(starts[-1] + count)
        cached, prompts = [r.computed for r, _ in chunks], [r.prompt for r, _ in chunks]
        slots = self.bank.slots([r.tokens[0] for r, _ in chunks])
        table = torch.full((len(chunks), max([1, *(len(r.blocks) for r, _ in chunks)])), -1, dtype=torch.int32)
        for row, (request, _) in enumerate(chunks):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
        return Batch(
            make_step(self.plan, starts, cached, prompts, slots, torch.device("cpu")),
            torch.tensor([p for a, b in zip(cached, ends, strict=True) for p in range(a, b)], dtype=torch.int64),
            table,
            torch.tensor(ends, dtype=torch.int32),
        )

    def _selecting(self, index: int, batch: Batch, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        selecting, layer_map = self.plan.selecting, self.maps[index]
        states = self.bank.states[:, selecting.index(index)] if index in selecting else None
        parts = LayerParts(self.model, index, self.caches[index], batch, states)
        parts.down = layer_map.down if layer_map is not None and self.merged else None
        hidden, residual = (
            torch.cat([x, x.new_full((self.padding, x.shape[1]), torch.nan)]) for x in (hidden, residual)
        )
        before = hidden.clone(), residual.clone()
        outs = torch.full_like(hidden, torch.nan), torch.full_like(residual, torch.nan)
        how = {"layer_map": layer_map, "read_count": self.read_count}
        packed_forward(parts, self.plan, index, batch.step, hidden, residual, *outs, **how)
        self.ran.append(Ran(index, batch.step, hidden, residual, before, *outs, parts.chosen))
        return outs[0][: batch.step.tokens], outs[1][: batch.step.tokens]

    def _dense(self, index: int, batch: Batch, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        parts, step = LayerParts(self.model, index, self.caches[index], batch, None), batch.step
        residual = hidden if residual is None else hidden + residual
        normed = parts.layer.input_layernorm(residual)
        parts.project(normed)
        every = PackedRows(torch.arange(step.tokens).int(), batch.positions.int(), step.cu_tokens)
        residual = residual + parts.attend(normed, every)
        return parts.layer.mlp(parts.layer.post_attention_layernorm(residual)), residual

    @torch.no_grad()
    def _sink(self, token: int) -> Tensor:
        """The normed state of ``token`` alone in each selecting layer, where it stays as it is."""
        states = []

        def keep(module: Any, args: Any, output: Any) -> Tensor:
            if module.self_attn.layer_idx in self.plan.selecting:
                states.append(module.input_layernorm(args[0])[0, 0])
            return args[0]

        layers = [layer for i, layer in enumerate(self.model.model.layers) if self.plan.ratio(i) < 1]
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            self.model.model(torch.tensor([[token]]), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(states) if states else torch.zeros(0, self.model.config.hidden_size)
