"""What stands in the methods of a patched model: its decoder's forward, its layers', and `generate()`."""

import dataclasses
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank import sink_state
from orthorank.calls import Call, cache_of, read_call
from orthorank.errors import OrthoRankError
from orthorank.families import Family
from orthorank.layer import removed_forward, selected_forward
from orthorank.patching import Patch
from orthorank.phases import Phase, phase_of, refuse_other_threads
from orthorank.refusals import refuse_outputs, refuse_unrun, without_cache

if TYPE_CHECKING:
    from orthorank.handle import Handle


class DecoderForward(Patch):
    """Reads padding and phase of each call before the layers run."""

    def __init__(self, handle: "Handle", decoder: Any) -> None:
        super().__init__(decoder, "forward")
        self.handle = handle
        # the name since transformers 5.24, and before
        self.cache_name = "cache" if "cache" in signature(type(decoder).forward).parameters else "past_key_values"

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        refuse_outputs(self.owner, kwargs)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if "cache" not in kwargs or past_key_values is not None:
            kwargs[self.cache_name] = past_key_values
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:  # the model's own error is the better one
            return self.original(**kwargs)
        handle = self.handle
        if not torch.compiler.is_compiling():
            refuse_other_threads(handle)
        if handle.call is not None:
            raise OrthoRankError(
                "two calls of a model with a plan applied overlap; give each thread a copy.deepcopy of the patched "
                "model, or take turns with a lock"
            )
        shape = given.shape[0], given.shape[1]
        call = read_call(shape, given.device, handle.phase, kwargs, handle.config.decode)
        # Before any layer runs: a failure further up would leave the lower layers' cache longer than the others'.
        if not (call.first or handle.phase.any_cache):
            sink_state.check_plan(cache_of(kwargs), handle.identity)
        if handle.selecting and not call.decodes_only:
            if not call.first:  # a model that drafts for itself runs its lower layers alone
                runs = [layer for layer in handle.selecting if layer < self.owner.config.num_hidden_layers]
                sink_state.check(cache_of(kwargs), runs, call.batch, handle.config.decode)
            if handle.config.kv == "selected":
                use_cache = without_cache(cache_of(kwargs), use_cache)
            call = call.prepared(handle.config, given.device)
        handle.call = call if handle.watcher is None else dataclasses.replace(call, watcher=handle.watcher)
        try:
            result = self.original(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        finally:
            handle.call = None
        refuse_unrun(handle.config.layers, call.ran, self.owner.config.num_hidden_layers)
        return result


class LayerForward(Patch):
    """The forward of one selected layer."""

    def __init__(self, handle: "Handle", layer: Any, index: int, family: Family) -> None:
        super().__init__(layer, "forward")
        self.handle, self.index, self.family = handle, index, family
        self.select = selected_forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        config, call, counts = self.handle.config, self.handle.call, self.handle.stats[self.index]
        if call is None:
            raise OrthoRankError(
                f"layer {self.index} selects tokens and was called outside its model's forward (by activation "
                "checkpointing around the layer, for example), where padding and prompt are not known; call the model, "
                "or handle.remove() first"
            )
        call.ran.append(self.index)
        valid, ratio, cache = call.tokens_in(), config.ratio(self.index), cache_of(kwargs)
        if cache is not None and call.first:
            sink_state.mark(cache, self.handle.identity if self.handle.removes or not call.decodes_only else "")
        if ratio == 0:
            counts.add(valid, 0)
            return removed_forward(self.index, hidden_states, cache)
        if call.decodes_only or ratio == 1:
            counts.add(valid, valid, unranked=valid if call.decodes_only else 0)
            return self.original(hidden_states, *args, **kwargs)
        output = self._select(hidden_states, kwargs["position_embeddings"], cache, call)
        counts.add(valid, call.updated[self.index], unranked=call.tokens_unranked())
        return output

    def _select(self, hidden_states: Tensor, cos_sin: tuple[Tensor, Tensor], cache: Any, call: Call) -> Any:
        parts = self.family.parts(self.owner)
        run = partial(self.select, parts, self.index, self.handle.config, call.on(hidden_states.device))
        if getattr(self.owner, "gradient_checkpointing", False) and self.owner.training:
            # as transformers' own layers do it, without a cache: the recomputation would fill it twice
            again = partial(run, position_embeddings=cos_sin)
            return self.owner._gradient_checkpointing_func(again, hidden_states)
        return run(hidden_states, cos_sin, cache)


class Generate(Patch):
    """`generate()`: what it is given is the prompt, everything after it is decoded."""

    def __init__(self, handle: "Handle", model: Any) -> None:
        super().__init__(model, "generate")
        self.handle = handle

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        handle = self.handle
        if handle.phase.context is not None:
            raise OrthoRankError(
                "generate() was called inside orthorank.context(), which says what is prompt; so does generate(): what "
                "it is given. Call it outside"
            )
        decoding = handle.phase.prompt == 0
        prompt = 0 if decoding else _prompt_length(inputs, kwargs)
        with phase_of(handle, Phase(prompt=prompt, keep_last=handle.config.keep_last, any_cache=decoding)):
            return self.original(inputs, *args, **kwargs)


class PrepareInputs(Patch):
    """Sees the ``[batch, tokens]`` mask before `generate()` turns it into a causal one for static caches."""

    def __init__(self, handle: "Handle", model: Any) -> None:
        super().__init__(model, "prepare_inputs_for_generation")
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mask, phase = kwargs.get("attention_mask"), self.handle.phase
        inputs = self.original(*args, **kwargs)
        if phase.prompt is not None:  # inside generate(): a phase of its own, which ends with it
            columns = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            given = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            phase.padding_mask, phase.unpadded, phase.decodes = columns, mask is None, False
            if columns is not None and isinstance(given, Tensor):
                phase.decodes = columns.shape[1] - given.shape[1] >= phase.prompt
        return inputs


def _prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Columns that `generate()` is given: of its inputs, or of the mask where a cache holds the first ones."""
    given = [inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    cache = cache_of(kwargs)
    if cache is not None and int(cache.get_seq_length()) > 0:
        given.append(kwargs.get("attention_mask"))
    lengths = [t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() >= 2]
    return max(lengths, default=1)  # without inputs, generation starts from one BOS token
