"""Apply a plan to one model instance, and undo it."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import signature
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from orthorank import sink_state
from orthorank.calls import Call, Watcher, cache_of, read_call
from orthorank.config import OrthoRankConfig, hub_id
from orthorank.errors import OrthoRankError
from orthorank.families import Family, decoder_of, device_of, family_of, unwrapped
from orthorank.layer import removed_forward, selected_forward
from orthorank.layer_status import LayerCounts, Status, status_of
from orthorank.patching import Patch
from orthorank.phases import Phase, context_lengths, phase_of, refuse_other_threads
from orthorank.plan_checks import check_integer
from orthorank.refusals import refuse_outputs, refuse_unrun, refused_methods, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "_orthorank_handle"


def apply(model: "PreTrainedModel", config: OrthoRankConfig) -> "Handle":
    """Make ``model`` follow the plan ``config``, this instance alone, until `Handle.remove`.

    In the plan's layers only the tokens most orthogonal to the sink token are updated while a prompt is processed;
    generated tokens are dense (paper, section 3, Algorithm 1).

    Args:
        model: a causal LM of a known family (see `orthorank.families.FAMILIES`), not patched yet; of a `PeftModel` or
            a compiled model the one inside is patched.
        config: a plan made for this model.

    Returns:
        The handle: ``remove()``, ``stats``, and the context managers ``decoding()`` and ``prefilling()``. It is a
        context manager itself, which removes the plan at its end.

    Raises:
        OrthoRankError: unknown family, a plan is applied already, or the plan was made for another model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1))
        >>> handle = apply(model, OrthoRankConfig(layers=[2], keep_ratio=1/3))
        >>> _ = model(torch.arange(12)[None])
        >>> handle.stats[2].calls, handle.stats[2].tokens_in, handle.stats[2].tokens_updated
        (1, 12, 4)
        >>> handle.remove()
    """
    model = unwrapped(model)
    family = family_of(model)
    if handle_of(model) is not None:
        raise OrthoRankError("a plan is applied to this model already; call handle.remove() first")
    check_plan(model, config)
    for index in config.layers:
        family.parts(decoder_of(model).layers[index])  # raises when a layer does not look right
    return Handle(model, dataclasses.replace(copy.deepcopy(config)), family)  # checks its fields again


def handle_of(model: Any) -> "Handle | None":
    """The handle of the plan that is applied to ``model``, or None. A deep copy of a patched model has its own."""
    model = unwrapped(model)
    for module in (model, getattr(model, "model", None)):  # the decoder carries the mark, too
        if (handle := getattr(module, "__dict__", {}).get(ATTRIBUTE)) is not None:
            return cast("Handle", handle)
    return None


def status(model: Any) -> Status:
    """What the applied plan has done so far: per layer its mode, ratio, calls, tokens in and tokens updated.

    Raises:
        OrthoRankError: no plan is applied.
    """
    handle = handle_of(model)
    if handle is None:
        raise OrthoRankError("no plan is applied to this model; apply one with orthorank.apply(model, config)")
    return status_of(handle.config, len(decoder_of(model).layers), handle.stats, family_of(model).note)


def context(model: Any, lengths: int | Sequence[int] | Tensor) -> AbstractContextManager[None]:
    """Inside, tokens are selected from the context of each row alone; the continuation behind it is dense.

    For scoring continuations: without this, tokens of the continuation compete with those of the context (as in the
    paper), so that the context is not computed alike for two of them. Inside, a call with context and continuation
    gives what a prefill of the context and dense steps over its cache give: k, windows and thresholds are those of the
    context. Nothing is forced: ``keep_last`` is 0. With ``decode="threshold"`` the continuation is selected as
    generated tokens are.

    Args:
        model: with a plan applied.
        lengths: how many tokens of each row are context, from its first token (not padding) on, 1 or more: an int for
            all rows, or one number for each. Of a shorter row all tokens are context.

    Raises:
        OrthoRankError: no plan is applied, or lengths is something else.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1))
        >>> handle = apply(model, OrthoRankConfig(layers=[2], keep_ratio=1/3))
        >>> with context(model, [9, 6]):  # 3 and 2 of the contexts, all of the continuations
        ...     _ = model(torch.arange(24).view(2, 12))
        >>> handle.stats[2].tokens_updated == (3 + 3) + (2 + 6)
        True
    """
    handle = handle_of(model)
    if handle is None:
        raise OrthoRankError("no plan is applied to this model; apply one with orthorank.apply(model, config)")
    return handle.context(lengths)


def check_plan(model: Any, config: OrthoRankConfig) -> None:
    """The plan was made for this model, as far as the plan says.

    Raises:
        OrthoRankError: naming the field, what the plan says and what the model has.
    """
    if not isinstance(config, OrthoRankConfig):
        raise OrthoRankError(f"config is a {type(config).__name__}; it must be an OrthoRankConfig")
    text = model.config.get_text_config()
    for name in ("num_hidden_layers", "hidden_size", "model_type"):
        wanted = getattr(config, name)
        if wanted is not None and wanted != getattr(text, name):
            raise OrthoRankError(
                f"the plan was made for a model with {name} {wanted!r} and this one has {getattr(text, name)!r}; "
                "find a plan for this model with a search"
            )
    here = hub_id(model)
    if config.model_id is not None and here is not None and config.model_id.lower() != here.lower():
        raise OrthoRankError(
            f"the plan was made for model_id {config.model_id!r} and this model is {here!r}; find a plan for this "
            "model with a search, or set the plan's model_id to None if the weights are meant to be alike"
        )
    if config.layers and config.layers[-1] >= text.num_hidden_layers:
        raise OrthoRankError(
            f"layers holds {config.layers[-1]}; the model has layers 0 to {text.num_hidden_layers - 1}"
        )


class Handle(AbstractContextManager["Handle"]):
    """A plan that is applied to a model; made by `apply`.

    Attributes:
        model: what `apply` was given; config: a copy of the plan.
        stats: `LayerCounts` of each selected layer, by number.
    """

    def __init__(self, model: "PreTrainedModel", config: OrthoRankConfig, family: Family) -> None:
        decoder = decoder_of(model)
        self.model, self.config = model, config
        self.stats = {index: LayerCounts(device_of(decoder.layers[index])) for index in config.layers}
        self.selecting = config.selecting
        self.removes = any(config.ratio(layer) == 0 for layer in config.layers)
        self.identity = sink_state.identity(config)
        self.phase = Phase()
        self.thread: int | None = None  # the one whose phase this is
        self.call: Call | None = None
        self.watcher: Watcher | None = None
        self._patches: list[Patch] = [DecoderForward(self, decoder)]
        if hasattr(model, "generate"):
            self._patches += [Generate(self, model), PrepareInputs(self, model), *refused_methods(model)]
        self._patches += [LayerForward(self, decoder.layers[i], i, family) for i in config.layers]
        for module in {model, decoder}:
            module.__dict__[ATTRIBUTE] = self

    def remove(self) -> None:
        """Undo the plan: the model gets back the identical objects it had.

        Raises:
            OrthoRankError: a method was replaced by someone else in the meantime; nothing is undone then.
        """
        for patch in self._patches:
            patch.check_on_top()
        for patch in reversed(self._patches):
            patch.undo()
        self._patches = []
        for module in {self.model, decoder_of(self.model)}:
            module.__dict__.pop(ATTRIBUTE, None)

    def decoding(self) -> AbstractContextManager[None]:
        """Inside, every token of every call is a generated one, however many come in one call.

        That is dense, unless the plan says ``decode="threshold"``. A cache may be continued whoever filled it.
        """
        return phase_of(self, Phase(prompt=0, decodes=True, any_cache=True))

    def prefilling(self, keep_last: int | None = None) -> AbstractContextManager[None]:
        """Inside, every call holds the whole prompt or its end, as in `generate()`.

        Args:
            keep_last: tokens at each row's end that are always updated; None: the plan's.
        """
        keep = self.config.keep_last if keep_last is None else keep_last
        check_integer("keep_last", keep, 0)
        return phase_of(self, Phase(keep_last=keep))

    def context(self, lengths: int | Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Inside, so many tokens of each row are prompt and the others generated ones; see `orthorank.context`."""
        return phase_of(self, Phase(context=context_lengths(lengths)))

    @contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        """Inside, ``watcher(layer, positions, call)`` is called with what each selected layer has chosen.

        ``positions`` are int32 ``[batch, most]``, ascending, -1 past a row's count; they count the tokens of the call,
        whose padding `call` knows. Calls in which all tokens are dense are left out.
        """
        before, self.watcher = self.watcher, watcher
        try:
            yield
        finally:
            self.watcher = before

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._patches:
            self.remove()


class DecoderForward(Patch):
    """Reads padding and phase of each call before the layers run."""

    def __init__(self, handle: Handle, decoder: Any) -> None:
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

    def __init__(self, handle: Handle, layer: Any, index: int, family: Family) -> None:
        super().__init__(layer, "forward")
        self.handle, self.index, self.family = handle, index, family

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
        run = partial(selected_forward, parts, self.index, self.handle.config, call.on(hidden_states.device))
        if getattr(self.owner, "gradient_checkpointing", False) and self.owner.training:
            # as transformers' own layers do it, without a cache: the recomputation would fill it twice
            again = partial(run, position_embeddings=cos_sin)
            return self.owner._gradient_checkpointing_func(again, hidden_states)
        return run(hidden_states, cos_sin, cache)


class Generate(Patch):
    """`generate()`: what it is given is the prompt, everything after it is decoded."""

    def __init__(self, handle: Handle, model: Any) -> None:
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

    def __init__(self, handle: Handle, model: Any) -> None:
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
