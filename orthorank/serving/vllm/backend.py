"""Metadata of a step for the selecting layers, through the attention backend that vLLM chose.

A selecting layer's attention gets a subclass of the backend, whose builder adds the step to what the backend builds.
The layer keeps the backend's kernels, its cache, and its name; it only stands in a group of its own.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from orthorank.packed.sinks import SinkBank
from orthorank.packed.steps import Step, judged, make_step, selects
from orthorank.serving.vllm.counts import Counts
from orthorank.serving.vllm.requests import RequestTable
from orthorank.serving.vllm.serving import Serving
from orthorank.serving.vllm_interface.interface import served_dense

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass
class Shared:
    """What all selecting layers of a model share.

    Args:
        serving: how to serve; layers: the selecting ones, in order; bank: the sinks' states of each of these.
        requests: prompt lengths (negative: of dense prompts) and first tokens; removed: layers that are not there.
        normed: those of them that are corrected, whose input norm is there.
        dense: how many layers are neither; counts: what the first rank counts, None for the others.
        on: whether prompts are selected from; see `hooks.switch`.
        first: the attention of the first selecting layer, by vLLM's name: where it is, steps are counted.
    """

    serving: Serving
    layers: list[int]
    bank: SinkBank
    requests: RequestTable
    removed: tuple[int, ...] = ()
    normed: tuple[int, ...] = ()
    dense: int = 0
    counts: Counts | None = None
    first: str = ""
    on: bool = True

    def step(self, common: Any, device: "torch.device", *, counted: bool = False) -> Step | None:
        """The step that ``common`` (vLLM's metadata) describes; None when no prompt is in it: all layers are dense.

        Args:
            counted: whether this is where the step is counted: several builders may be asked for it.

        Raises:
            OrthoRankError: ``common`` does not say what of it is prompt.
        """
        count = partial(_count, self.counts if counted else None, self)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        if not starts[-1]:
            return None
        prompts, first = self.requests.rows(common)
        prompts = judged(self.serving.plan, prompts)  # of requests that no front end marked
        if not self.on:
            prompts = [-abs(prompt) for prompt in prompts]
        ends = common.seq_lens_cpu_upper_bound
        if ends is None:
            if _may_hold_prompts(common, prompts):
                raise served_dense(
                    "vLLM's metadata of this step has no seq_lens_cpu_upper_bound, so which of its tokens are prompt "
                    "is not known on the host"
                )
            count("none", prompts)
            return None
        lengths = [end - begin for begin, end in pairwise(starts)]
        cached = [end - length for end, length in zip(ends[: common.num_reqs].tolist(), lengths, strict=True)]
        selecting = selects(lengths, cached, prompts)
        if not any(selecting):
            dense = any(before < -prompt for before, prompt in zip(cached, prompts, strict=True))
            count("dense" if dense else "none", prompts)
            return None
        wanted = [token for token, selected in zip(first, selecting, strict=True) if selected]
        slots = iter(self.bank.slots(wanted))
        rows = [next(slots) if selected else 0 for selected in selecting]
        step = make_step(self.serving.plan, starts, cached, prompts, rows, device)
        count("selected", prompts, step.prompt_tokens)
        return step

    def count_layer(self, ranked: int, updated: int | None, *, portable: bool) -> None:
        """A selecting layer ran; ``updated`` is None where the host does not know: then neither number is counted."""
        if self.counts is None:
            return
        if updated is not None:
            self.counts.add("orthorank_layer_tokens", "selecting", ranked)
            self.counts.add("orthorank_layer_tokens_updated", "selecting", updated)
        if portable:
            self.counts.add("orthorank_fallbacks", "portable")


def _count(counts: Counts | None, shared: Shared, kind: str, prompts: list[int], tokens: int = 0) -> None:
    if counts is None or not any(prompts):  # nothing is asked: vLLM warms up
        return
    counts.add("orthorank_steps", kind)
    for layers, number in (("removed", len(shared.removed)), ("dense", shared.dense)):
        counts.add("orthorank_layer_tokens", layers, tokens * number)
    counts.add("orthorank_layer_tokens_updated", "dense", tokens * shared.dense)


def _may_hold_prompts(common: Any, prompts: list[int]) -> bool:
    """Whether a step of unknown lengths can have prompt tokens: a row is a request's, and not known to generate."""
    if not any(prompts):
        return False
    return common.is_prefilling is None or bool(common.is_prefilling[: common.num_reqs].any())


@dataclasses.dataclass(frozen=True)
class StepMetadata:
    """What the layers find beside the backend's own metadata.

    Args:
        step: see `Shared.step`; common: vLLM's metadata of all backends.
        build: the backend's own builder, for metadata of other rows.
    """

    step: Step | None
    common: Any
    build: Callable[..., Any]


def step_metadata(metadata: Any) -> StepMetadata | None:
    """What `selecting_backend` left at the backend's metadata; None while vLLM warms up.

    Raises:
        OrthoRankError: the metadata come from another builder, which knows of no step.
    """
    if metadata is None:
        return None
    if (found := getattr(metadata, "orthorank", None)) is None:
        raise served_dense(
            f"vLLM's {type(metadata).__name__} of a selecting layer was built by another builder than the plan's"
        )
    return cast(StepMetadata, found)


@cache
def selecting_backend(backend: Any) -> Any:
    """``backend`` for a selecting layer."""
    from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend

    base: Any = backend.get_builder_cls()

    class Builder(base):
        """Adds the step to the backend's metadata."""

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            attention = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            self._shared: Shared = attention.orthorank
            self._device = device
            self._counts = self._shared.first in layer_names

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any, *more: Any, **named: Any) -> Any:
            """Whole graphs of generated tokens alone: what a prompt selects is not the same twice."""
            own = super().get_cudagraph_support(vllm_config, kv_cache_spec, *more, **named)
            return min(own, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **more: Any
        ) -> Any:
            """The backend's metadata, with the step."""
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **more)
            step = self._shared.step(common_attn_metadata, self._device, counted=self._counts)
            metadata.orthorank = StepMetadata(step, common_attn_metadata, super().build)
            return metadata

        def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any, *more: Any, **named: Any) -> Any:
            """The metadata of another group of the cache."""
            updated = super().update_block_table(metadata, blk_table, slot_mapping, *more, **named)
            common = metadata.orthorank.common.replace(block_table_tensor=blk_table, slot_mapping=slot_mapping)
            updated.orthorank = dataclasses.replace(metadata.orthorank, common=common)
            return updated

    return subclass_attention_backend("OrthoRank", backend, Builder)
