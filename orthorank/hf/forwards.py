"""What stands in the methods of a patched model: its decoder's forward, its layers', and `generate()`."""

import copy
import dataclasses
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from orthorank.calls.context import ForwardContext, Watcher
from orthorank.calls.generating import PREPARES, phase_inside
from orthorank.calls.reading import Phase, cache_of, phase_of, read_call
from orthorank.calls.unmasked import Watch
from orthorank.common.call_lock import CallLock
from orthorank.common.criteria import check_pointwise, is_pointwise
from orthorank.common.errors import OrthoRankError, shown
from orthorank.common.patching import Patch
from orthorank.config import OrthoRankConfig
from orthorank.correction import LayerMap
from orthorank.families import Family
from orthorank.families.intact import TakenApart, implementation_of
from orthorank.families.known import device_of, layers_of
from orthorank.families.norm import Norm
from orthorank.families.parts import Parts
from orthorank.hf import cache_state as sink_state
from orthorank.hf.ablations import without_cache
from orthorank.hf.correction import corrected, map_of, normed_of
from orthorank.hf.layer import keep_sinks, removed_forward, selected_forward
from orthorank.hf.refusals import refuse_outputs, refuse_unrun
from orthorank.hf.selection import LayerPlan, prepared
from orthorank.hf.status import LayerCounts


class Applied:
    """What the methods of a patched model know of the plan ``config`` that is applied to it: see `Handle`."""

    def __init__(self, model: Any, config: OrthoRankConfig) -> None:
        layers, ratios = layers_of(model), config.ratios
        self.model, self.config = model, config
        self._as_applied = copy.deepcopy(config)
        self.stats = {index: LayerCounts(device_of(layers[index])) for index in config.layers}
        self.selecting = config.selecting
        self.skips = any(ratio < 1 for ratio in ratios.values())
        self.removes = any(ratio == 0 for ratio in ratios.values())
        self.corrects_removed = any(ratios[layer] == 0 for layer in config.ranks)
        self.identity = sink_state.identity(config)
        self.phase = self._plain()
        self.lock = CallLock()
        self.call: ForwardContext | None = None
        self.watcher: Watcher | None = None
        self.unmasked = Watch()
        self.layers: list[LayerForward] = []

    def _plain(self) -> Phase:
        """What holds of a call that the user said nothing of.

        A model that generates is scored, as the paper does it, with no token forced. Of one that does not, an encoder
        or a classifier, the last token's state is what is asked for.
        """
        return Phase(keep_last=0 if hasattr(self.model, "generate") else self.config.keep_last)

    def check_config(self) -> None:
        """``config`` is the plan that was applied.

        Raises:
            OrthoRankError: a field of it was changed: the layers go by what they were made with.
        """
        if self.config == self._as_applied:
            return
        for field in dataclasses.fields(self._as_applied):
            now, then = getattr(self.config, field.name), getattr(self._as_applied, field.name)
            if now != then:
                raise OrthoRankError(
                    f"handle.config.{field.name} is {shown(now)}, and was {shown(then)} when the plan was applied: "
                    "what is changed there changes no layer; call handle.remove(), then apply(model, config) with the "
                    "plan that you want"
                )

    def check_layers(self, config: Any) -> None:
        """The selecting layers are what their family's spec says; see `orthorank.families.intact`.

        Args:
            config: of the decoder.

        Raises:
            OrthoRankError: one is not any more.
        """
        implementation = implementation_of(config)
        for layer in self.layers:
            if layer.taken_apart is not None:
                layer.taken_apart.check(implementation)


class DecoderForward(Patch):
    """Reads padding and phase of each call before the layers run."""

    def __init__(self, handle: Applied, decoder: Any) -> None:
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
        handle = self.handle
        if handle.skips:
            refuse_outputs(self.owner, kwargs)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if "cache" not in kwargs or past_key_values is not None:
            kwargs[self.cache_name] = past_key_values
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:  # the model's own error is the better one
            return self.run_original(**kwargs)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        if torch.compiler.is_compiling():
            if handle.phase.prepared:
                handle.phase.prepared = False
            return self._run(given, inputs, kwargs)
        with handle.lock:
            return self._run(given, inputs, kwargs)

    def _run(self, given: Tensor, inputs: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        handle = self.handle
        if handle.call is not None:
            raise OrthoRankError(
                "two calls of a model with a plan applied overlap: it was called while it was being called, by a hook "
                "perhaps; call a copy.deepcopy of the patched model there"
            )
        if not torch.compiler.is_compiling():
            handle.check_config()
        if kwargs["attention_mask"] is None and handle.selecting and handle.phase.context is None:
            handle.unmasked(given, self.owner.config)
        shape = given.shape[0], given.shape[1]
        phase = handle.phase
        if not torch.compiler.is_compiling():
            phase = phase_inside(
                phase, handle.model, self.owner, handle.config.keep_last, shape[1], cache_of(kwargs), inputs
            )
        call = read_call(
            shape, given.device, phase, kwargs, handle.config.decode, handle.corrects_removed, handle.config.min_prompt
        )
        # Before any layer runs: a failure further up would leave the lower layers' cache longer than the others'.
        if not (call.first or handle.phase.any_cache):
            sink_state.check_filled_by(cache_of(kwargs), handle.identity)
        if handle.selecting and not call.decodes_only:
            if not torch.compiler.is_compiling():
                handle.check_layers(self.owner.config)
            if not (call.first or is_pointwise(handle.config.criterion)):  # asked anew: an edit may have changed it
                what = f"a chunk over {call.past} cached tokens: give the prompt in one call"
                check_pointwise(handle.config.criterion, what)
            if not call.first:  # a model that drafts for itself runs its lower layers alone
                runs = [layer for layer in handle.selecting if layer < self.owner.config.num_hidden_layers]
                sink_state.check(cache_of(kwargs), runs, call.batch, handle.config.decode)
            if handle.config.kv == "selected":
                inputs["use_cache"] = without_cache(cache_of(kwargs), inputs["use_cache"])
            call = prepared(call, handle.config, given.device)
        for layer in handle.layers:
            layer.ran = False
        handle.call = call if handle.watcher is None else dataclasses.replace(call, watcher=handle.watcher)
        try:
            result = self.run_original(**inputs, **kwargs)
        finally:
            handle.call = None
        ran = [layer.index for layer in handle.layers if layer.ran]
        refuse_unrun(handle.config.layers, ran, self.owner.config.num_hidden_layers)
        return result


class LayerForward(Patch):
    """The forward of one selected layer.

    What differs from layer to layer is read from here alone, so that layers which are compiled one by one share a
    graph wherever those of transformers do.
    """

    def __init__(self, handle: Applied, layer: Any, index: int, family: Family) -> None:
        super().__init__(layer, "forward")
        self.handle, self.index, self.family = handle, index, family
        self.plan, self.counts = LayerPlan(handle.config, index), handle.stats[index]
        self.ratio = self.plan.own_ratio
        self.map = map_of(handle.config, index, device_of(layer), handle.model.dtype)
        self.ran = False  # in the call that is running, or the last one
        self.taken_apart = TakenApart(family, layer, index, self.replaced) if 0 < self.ratio < 1 else None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        handle, counts = self.handle, self.counts
        call = handle.call
        if call is None or not (torch.compiler.is_compiling() or handle.lock.is_mine()):
            raise OrthoRankError(
                f"layer {self.index} selects tokens and was called outside its model's forward (by activation "
                "checkpointing around the layer, for example), where padding and prompt are not known; call the model, "
                "or handle.remove() first"
            )
        self.ran = True
        valid, cache = call.tokens_in(), cache_of(kwargs)
        if cache is not None and call.first:
            plain = call.decodes_only and not call.short and not handle.removes
            setattr(cache, sink_state.PLAN, "" if plain else handle.identity)
        if self.ratio == 0:
            counts.add(valid, 0)
            # Without a cache no graph reads the index: torch 2.11 would compile each removed layer apart.
            left = hidden_states if cache is None else removed_forward(self.index, hidden_states, cache)
            layer_map = self._map_for(left)
            if layer_map is None:
                return left
            return corrected(left, normed_of(self.family, self.owner, left), call.on(left.device), layer_map)
        if call.decodes_only or self.ratio == 1:
            counts.add(valid, valid, unranked=valid if call.decodes_only else 0)
            if call.short and cache is not None and self.ratio < 1:
                here, norm = call.on(hidden_states.device), Norm.of(self.family, self.owner, self.family.input_norm)
                keep_sinks(norm, self.index, self.plan, here, hidden_states, cache)
            return self.run_original(hidden_states, *args, **kwargs)
        updated: list[int | Tensor] = []
        output = self._select(hidden_states, kwargs["position_embeddings"], cache, call, updated)
        counts.add(valid, updated[0], unranked=call.tokens_unranked())
        return output

    def _map_for(self, hidden_states: Tensor) -> LayerMap | None:
        """The layer's map where these states are, in their dtype: the model may have been moved since, or converted."""
        if self.map is None or torch.compiler.is_compiling():  # in a graph `corrected` brings it there
            return self.map
        where = hidden_states.device, hidden_states.dtype
        if (self.map.down.device, self.map.down.dtype) != where:
            self.map = map_of(self.plan, self.index, *where)
        return self.map

    def _select(
        self,
        hidden_states: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        cache: Any,
        call: ForwardContext,
        updated: list[int | Tensor],
    ) -> Any:
        if torch.compiler.is_compiling() or self.taken_apart is None or self.taken_apart.parts is None:
            parts = Parts.of(self.family, self.owner)
        else:
            parts = self.taken_apart.parts  # looked at when the call began
        here, layer_map = call.on(hidden_states.device), self._map_for(hidden_states)
        run = partial(selected_forward, parts, self.index, self.plan, here, updated=updated, layer_map=layer_map)
        if getattr(self.owner, "gradient_checkpointing", False) and self.owner.training:
            # As transformers' own layers do it, without a cache: the recomputation would fill it twice. It runs in
            # backward, in whatever thread, while the model may be in another call: so all it needs is bound here.
            again = partial(run, position_embeddings=cos_sin)
            return self.owner._gradient_checkpointing_func(again, hidden_states)
        return run(hidden_states, cos_sin, cache)


class Generate(Patch):
    """`generate()`: what it is given is the prompt, everything after it is decoded."""

    def __init__(self, handle: Applied, model: Any) -> None:
        super().__init__(model, "generate")
        self.handle = handle

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        handle = self.handle
        with handle.lock:  # before anything is read that another thread may have said
            if handle.phase.context is not None:
                raise OrthoRankError(
                    "generate() was called inside orthorank.context(), which says what is prompt; so does generate(): "
                    "what it is given. Call it outside"
                )
            decoding = handle.phase.prompt == 0
            prompt = 0 if decoding else _prompt_length(inputs, kwargs)
            with phase_of(handle, Phase(prompt=prompt, keep_last=handle.config.keep_last, any_cache=decoding)):
                return self.run_original(inputs, *args, **kwargs)


class PrepareInputs(Patch):
    """Sees the ``[batch, tokens]`` mask before `generate()` turns it into a causal one for static caches."""

    def __init__(self, handle: Applied, model: Any) -> None:
        super().__init__(model, PREPARES)
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.handle.lock:  # `generate()` of the class, in another thread, would change the phase of this one
            return self._prepare(args, kwargs)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, phase = kwargs.get("attention_mask"), self.handle.phase
        inputs = self.run_original(*args, **kwargs)
        if phase.prompt is not None:  # inside generate(): a phase of its own, which ends with it
            columns = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            given = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            phase.padding_mask, phase.unpadded, phase.decodes = columns, mask is None, False
            phase.given = given.shape[1] if isinstance(given, Tensor) else None
            phase.prepared, phase.cache = True, cache_of(inputs)
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
