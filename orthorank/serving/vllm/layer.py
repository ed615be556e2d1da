"""vLLM's decoder layers as selecting layers: the same modules and weights, another forward."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from orthorank.common.errors import OrthoRankError
from orthorank.packed import operator
from orthorank.packed.layer import PackedParts, RMSNorm, packed_forward
from orthorank.packed.selection import PackedRows
from orthorank.packed.steps import Step
from orthorank.serving.vllm import attention as attending
from orthorank.serving.vllm import hooks, maps
from orthorank.serving.vllm.backend import Shared, StepMetadata, selecting_backend, step_metadata
from orthorank.serving.vllm.projections import Projections
from orthorank.serving.vllm.removed import mixed
from orthorank.serving.vllm_interface.interface import OBJECTS, expect
from orthorank_kernels import gather_rows


class SelectingLayer(nn.Module):
    """What a decoder layer's class is mixed with. The operator finds the layer by ``orthorank_name``."""

    orthorank_name: str
    orthorank: Shared
    orthorank_index: int
    self_attn: Any
    input_layernorm: Any

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor, **kwargs: Any) -> Any:
        """The layer as one operator; arguments and result are vLLM's."""
        return operator.decoder_layer(positions, hidden_states, residual, self.orthorank_name)

    def run(
        self, positions: Tensor, hidden: Tensor, residual: Tensor, out_hidden: Tensor, out_residual: Tensor
    ) -> None:
        """What the operator does: see `orthorank.packed.operator`."""
        found = step_metadata(hooks.metadata_of(self.self_attn.attn.layer_name))
        if found is None or found.step is None:
            self._run_dense(positions, hidden, residual, out_hidden, out_residual)
            return
        shared = self.orthorank
        parts = LayerParts(self, found, positions, self.orthorank_projections)
        plan, reads = shared.serving.plan, shared.serving.threshold_count == "read"
        packed_forward(
            parts,
            plan,
            self.orthorank_index,
            found.step,
            hidden,
            residual,
            out_hidden,
            out_residual,
            layer_map=maps.held(self),
            read_count=reads,
        )
        step, known = found.step, reads or plan.select != "threshold"
        updated = max(0, parts.query_count - (step.tokens - step.prompt_tokens)) if known else None
        portable = shared.serving.attention == "auto" and parts.query_count > 0 and not self.orthorank_paged
        shared.count_layer(step.prompt_tokens, updated, portable=portable)

    def _run_dense(
        self, positions: Tensor, hidden: Tensor, residual: Tensor, out_hidden: Tensor, out_residual: Tensor
    ) -> None:
        """The layer as vLLM has it. Its norms write to what they are given, so they are given the outputs."""
        out_hidden.copy_(hidden)
        out_residual.copy_(residual)
        new_hidden, new_residual = super().forward(positions, out_hidden, out_residual)
        for out, new in ((out_hidden, new_hidden), (out_residual, new_residual)):
            if new.data_ptr() != out.data_ptr():
                out.copy_(new)

    @cached_property
    def orthorank_projections(self) -> Projections:
        """Made at the first use, when the weights are there."""
        return Projections(self.self_attn)

    @cached_property
    def orthorank_paged(self) -> bool:
        """Whether the package's kernel reads the cache."""
        wanted = self.orthorank.serving.attention
        return attending.choose_way(wanted, self.self_attn.attn, self.input_layernorm.weight.dtype)

    @cached_property
    def orthorank_writes(self) -> bool:
        """Whether the package's kernel may write the cache, too, which it reads."""
        return self.orthorank_paged and attending.writes_plainly(self.self_attn.attn, self.input_layernorm.weight.dtype)


class LayerParts(PackedParts):
    """A layer of vLLM in one step."""

    def __init__(self, layer: Any, metadata: StepMetadata, positions: Tensor, projections: Projections) -> None:
        self.layer, self.metadata = layer, metadata
        self.positions, self.projections = positions, projections
        self.query_count = 0  # queries

    @property
    def input_norm(self) -> RMSNorm:
        """The norm before attention."""
        norm = self.layer.input_layernorm
        return RMSNorm(norm.weight, norm.variance_epsilon)

    @property
    def pre_mlp_norm(self) -> RMSNorm:
        """The norm before the MLP."""
        norm = self.layer.post_attention_layernorm
        return RMSNorm(norm.weight, norm.variance_epsilon)

    def sinks(self, step: Step) -> Tensor:
        """From the bank, by the first token of each segment's request."""
        shared: Shared = self.layer.orthorank
        number = shared.layers.index(self.layer.orthorank_index)
        return shared.bank.states[:, number].index_select(0, step.sink_slots)

    def project(self, normed: Tensor) -> None:
        """Keys and values of all tokens go where the backend puts them: by one kernel, or by vLLM's two."""
        attention = self.layer.self_attn.attn
        rotation = self.projections.rotation if self.layer.orthorank_writes else None
        if rotation is not None:
            attending.write_rotated(attention, *self.projections.unrotated(normed), self.positions, rotation)
            return
        keys, values = self.projections.keys_and_values(normed, self.positions)
        hooks.write_cache(attention, keys, values)

    def attend(self, normed: Tensor, chosen: PackedRows) -> Tensor:
        """By the package's kernel or the backend's."""
        positions = chosen.positions.clamp(min=0).long()
        queries = self.projections.queries(gather_rows(normed, chosen.rows), positions, chosen.rows)
        self.query_count = len(chosen.rows)
        attention = self.layer.self_attn.attn
        attend = attending.attend_paged if self.layer.orthorank_paged else attending.attend_portable
        attn_out = attend(attention, queries, chosen, self.metadata)
        projected, _ = self.layer.self_attn.o_proj(attn_out.flatten(1))
        return projected

    def feed_forward(self, mlp_in: Tensor) -> Tensor:
        """The layer's MLP."""
        return self.layer.mlp(mlp_in)

    def agree(self, scores: Tensor) -> Tensor:
        """The first rank's, if asked for."""
        return hooks.parallel_group().broadcast(scores, src=0) if self.agrees else scores

    @property
    def agrees(self) -> bool:
        """Whether that is asked for, and there are others."""
        return self.layer.orthorank.serving.scores != "own" and hooks.parallel_group().world_size > 1


def make_selecting(layer: Any, index: int, shared: Shared, contexts: dict[str, Any]) -> None:
    """Turn ``layer`` into a selecting layer, known as such in ``contexts``, vLLM's layers by name."""
    _expect_parts(layer)
    attention = layer.self_attn.attn
    if obstacle := attending.backend_obstacle(attention.attn_backend):
        raise OrthoRankError(obstacle)
    attention.attn_backend = selecting_backend(attention.attn_backend)
    attention.orthorank = shared
    if index == shared.layers[0]:
        shared.first = attention.layer_name
    layer.orthorank, layer.orthorank_index = shared, index
    layer.orthorank_name = f"{attention.layer_name}.orthorank"
    contexts[layer.orthorank_name] = layer
    layer.__class__ = mixed(SelectingLayer, layer.__class__)


def _expect_parts(layer: Any) -> None:
    """What this module, `projections` and `first_token` use of a decoder layer."""
    expect(layer, **OBJECTS["layer"])
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        expect(norm, **OBJECTS["norm"])
    expect(layer.self_attn, **OBJECTS["self_attn"])
    expect(layer.self_attn.qkv_proj, **OBJECTS["qkv_proj"])
    attention = layer.self_attn.attn
    expect(attention, **OBJECTS["attention"])
    expect(attention.attn_backend, **OBJECTS["backend"])
    expect(attention.impl, **OBJECTS["impl"])
