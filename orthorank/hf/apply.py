"""Apply a plan to one model instance, and undo it."""

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from orthorank.calls.context import Watcher
from orthorank.calls.generating import generating
from orthorank.calls.reading import Phase, context_lengths, phase_of
from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError, check_integer, shown, type_of
from orthorank.common.patching import Patch, forward_of
from orthorank.config import OrthoRankConfig, hub_id
from orthorank.families import Family
from orthorank.families.intact import TakenApart, check_classes
from orthorank.families.known import decoder_of, family_of, layers_of, unwrapped
from orthorank.families.parts import Parts
from orthorank.hf.family_check import checked_family
from orthorank.hf.forwards import Applied, DecoderForward, Generate, LayerForward, PrepareInputs
from orthorank.hf.refusals import refused_methods
from orthorank.hf.status import Status, status_of
from orthorank.plan_checks import MOST, misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "_orthorank_handle"


def apply(
    model: "PreTrainedModel", config: OrthoRankConfig | str | os.PathLike[str], *, revision: str | None = None
) -> "Handle":
    """Make ``model`` follow the plan ``config``, this instance alone, until `Handle.remove`.

    In the plan's layers only the tokens most orthogonal to the sink token are updated while a prompt is processed;
    generated tokens are dense (paper, section 3, Algorithm 1).

    A padded batch needs its ``attention_mask`` (``[batch, tokens]``, 1 for tokens and 0 for padding), on whichever side
    the padding is and whatever head reads the states. A dense causal model gives the same without one where the padding
    is on the right; with a plan the pads would be counted and ranked. A call without a mask that seems to end in
    padding warns, once.

    A model without `generate()`, an encoder as `AutoModel` loads it or a classifier, is asked for the state of each
    row's last token: there every call updates the plan's ``keep_last`` tokens at the end of each row, as `generate()`
    does. ``with handle.prefilling(keep_last=0):`` forces none.

    Args:
        model: a causal LM of a known family (see `orthorank.FAMILIES` and `orthorank.register_family`), not patched
            yet; of a `PeftModel` or a compiled model the one inside is patched.
        config: a plan made for this model, or where it is: a file, a folder, or ``org/name`` on the Hugging Face Hub.
            The maps of a corrected one are fetched and read after the rest is known to be of this model.
        revision: branch, tag or commit of a plan on the Hub.

    Returns:
        The handle: ``remove()``, ``stats``, and the context managers ``decoding()`` and ``prefilling()``. It is a
        context manager itself, which removes the plan at its end.

    Raises:
        OrthoRankError: unknown family, or a registered one whose spec is wrong; a plan is applied already; the plan
            was made for another model, or cannot be read.

    Warns:
        UserWarning: the maps of a corrected plan were fitted on other weights (those of another fine-tune, or with an
            adapter that is not active here, or without one that is), as far as both are known.

    Example:
        >>> import torch
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
    family = checked_family(model)
    if handle_of(model) is not None:
        raise OrthoRankError("a plan is applied to this model already; call handle.remove() first")
    if isinstance(config, (str, os.PathLike)):
        config = OrthoRankConfig.from_pretrained(config, revision=revision, check=partial(check_plan, model))
    elif revision is not None:
        raise OrthoRankError(f"revision is {shown(revision)}; it is of a plan on the Hub, and config is not its name")
    check_plan(model, config)
    for index, layer in enumerate(layers_of(model)):  # raises when one does not look right, before anything changes
        if 0 < config.ratio(index) < 1:
            TakenApart(family, layer, index, forward_of(layer))
        elif index in config.layers:
            check_classes(family, layer, index)
            Parts.of(family, layer)
    followed = dataclasses.replace(copy.deepcopy(config))  # checks its fields again
    followed.source = config.source
    if followed.correction is not None:
        from orthorank.hf.provenance import warn_of_other_weights  # corrected plans alone need it

        warn_of_other_weights(model, followed)
    return Handle(model, followed, family)


def handle_of(model: Any) -> "Handle | None":
    """The handle of the plan that is applied to ``model``, or None. A deep copy of a patched model has its own.

    Args:
        model: whatever `apply` takes, or the decoder of such a model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1))
        >>> handle = apply(model, OrthoRankConfig(layers=[2]))
        >>> handle_of(model) is handle, repr(handle)
        (True, '<Handle: layers 2 select; applied to a LlamaForCausalLM>')
        >>> handle.remove()
        >>> handle_of(model) is None
        True
    """
    model = unwrapped(model)
    for module in (model, getattr(model, "model", None)):  # the decoder carries the mark, too
        if (handle := getattr(module, "__dict__", {}).get(ATTRIBUTE)) is not None:
            return cast("Handle", handle)
    return None


def status(model: Any) -> Status:
    """What the applied plan has done so far: per layer its mode, ratio, calls, tokens in and tokens updated.

    Args:
        model: with a plan applied.

    Raises:
        OrthoRankError: no plan is applied.
    """
    return _applied_to(model)._status()


def context(
    model: Any, lengths: int | Sequence[int] | Tensor, keep_last: int | None = None
) -> AbstractContextManager[None]:
    """Inside, tokens are selected from the context of each row alone; the continuation behind it is dense.

    For scoring continuations: without this, tokens of the continuation compete with those of the context (as in the
    paper), so that the context is not computed alike for two of them. Inside, a call with context and continuation
    gives what `generate()` gives: a prefill of the context, and dense steps over its cache. k, windows and thresholds
    are those of the context, and its last tokens are updated as the plan says. With ``decode="threshold"`` the
    continuation is selected as generated tokens are.

    Who trains on rollouts (or scores what a model generated) computes log-probabilities in here, with the lengths of
    the prompts: a plain forward gives others than those that the tokens were drawn from. Who compares with perplexity
    or with the harness's scores passes ``keep_last=0``, as plain calls have it.

    Args:
        model: with a plan applied.
        lengths: how many tokens of each row are context, from its first token (not padding) on, 1 or more: an int for
            all rows, or ``[batch]`` integers. Of a shorter row all tokens are context.
        keep_last: tokens at each context's end that are always updated, from the call on in which the context ends;
            None: the plan's, as in `generate()`.

    Raises:
        OrthoRankError: no plan is applied, or lengths or keep_last is something else.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1))
        >>> handle = apply(model, OrthoRankConfig(layers=[2], keep_ratio=1/3))
        >>> with context(model, [9, 6]):  # 3 and 2 of the contexts (their last tokens among them), all that follows
        ...     _ = model(torch.arange(24).view(2, 12))
        >>> handle.stats[2].tokens_updated == (3 + 3) + (2 + 6)
        True
    """
    return _applied_to(model).context(lengths, keep_last)


def _applied_to(model: Any) -> "Handle":
    if (handle := handle_of(model)) is None:
        raise OrthoRankError("no plan is applied to this model; apply one with orthorank.apply(model, config)")
    return handle


def check_plan(model: Any, config: OrthoRankConfig) -> None:
    """The plan was made for this model, as far as the plan says.

    Raises:
        OrthoRankError: naming the field, what the plan says and what the model has.
    """
    if not isinstance(config, OrthoRankConfig):
        raise OrthoRankError(f"config is {type_of(config)}; it must be an OrthoRankConfig or where one is")
    for misfit in misfits(config, model.config.get_text_config()):
        raise OrthoRankError(misfit)
    here = hub_id(model)
    if config.model_id is not None and here is not None and config.model_id.lower() != here.lower():
        raise OrthoRankError(
            f"the plan was made for model_id {config.model_id!r} and this model is {here!r}; find a plan for this "
            "model with a search, or set the plan's model_id to None if the weights are meant to be alike"
        )


class Handle(Applied, AbstractContextManager["Handle"]):
    """A plan that is applied to a model; made by `apply`.

    Args:
        model, config, family: what `apply` has checked.

    Attributes:
        model: what `apply` was given; config: a copy of the plan, to read. A call that finds it changed is refused.
        stats: `LayerCounts` of each selected layer, by number.
    """

    def __init__(self, model: "PreTrainedModel", config: OrthoRankConfig, family: Family) -> None:
        super().__init__(model, config)
        decoder, layers = decoder_of(model), layers_of(model)
        self._applied_inside = generating(decoder) is not None  # a generate(): what runs in it may come and go
        self._patches: list[Patch] = [DecoderForward(self, decoder)]
        if hasattr(model, "generate"):
            self._patches += [Generate(self, model), PrepareInputs(self, model), *refused_methods(model)]
        self.layers = [LayerForward(self, layers[i], i, family) for i in config.layers]
        self._patches += self.layers
        for module in {model, decoder}:
            module.__dict__[ATTRIBUTE] = self

    def __repr__(self) -> str:
        """One line: what the plan does to which layers."""
        kinds = {"select": self.selecting, "removed": [i for i in self.config.layers if self.config.ratio(i) == 0]}
        said = [f"layers {words.layers(layers)} {kind}" for kind, layers in kinds.items() if layers]
        applied = "applied to" if self._patches else "was removed from"
        return f"<Handle: {'; '.join(said) or 'all layers dense'}; {applied} {type_of(self.model)}>"

    def __str__(self) -> str:
        """The table of `status`."""
        return str(self._status())

    def _status(self) -> Status:
        number = len(decoder_of(self.model).layers)
        return status_of(self.config, number, self.stats, family_of(self.model).note)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the plan; what is said or under way around the original's calls is not of the copy."""
        return vars(self) | {"phase": self._plain(), "call": None, "watcher": None}

    def remove(self) -> None:
        """Undo the plan: the model gets back the identical objects it had.

        Raises:
            OrthoRankError: a method was replaced by someone else in the meantime, another thread is calling the
                model, or this one is, from a hook or inside `generate()`; nothing is undone then.
        """
        with self.lock:
            self._refuse_inside()
            for patch in self._patches:
                patch.check_on_top()
            for patch in reversed(self._patches):
                patch.undo()
            self._patches, self.layers = [], []
            for module in {self.model, decoder_of(self.model)}:
                module.__dict__.pop(ATTRIBUTE, None)

    def _refuse_inside(self) -> None:
        """A call would go on with the plan in some layers, and `generate()` with the plan for the prompt alone."""
        where = ""
        if self.call is not None:
            where = "while the model is being called (by a hook, perhaps)"
        elif self._patches and not self._applied_inside and generating(decoder_of(self.model)) is not None:
            where = "inside generate() (by a logits processor or a stopping criterion, perhaps)"
        if where:
            raise OrthoRankError(
                f"handle.remove() was called {where}, which would go on without the plan that it began with; remove "
                "the plan when that has returned, or use a copy.deepcopy of the model without it"
            )

    def decoding(self) -> AbstractContextManager[None]:
        """Inside, every token of every call is a generated one, however many come in one call.

        That is dense, unless the plan says ``decode="threshold"``. It may continue any cache.
        """
        return phase_of(self, Phase(prompt=0, decodes=True, any_cache=True))

    def prefilling(self, keep_last: int | None = None) -> AbstractContextManager[None]:
        """Inside, every call holds the whole prompt or its end, as in `generate()`.

        Args:
            keep_last: tokens at each row's end that are always updated; None: the plan's.
        """
        return phase_of(self, Phase(keep_last=self._kept(keep_last)))

    def context(
        self, lengths: int | Sequence[int] | Tensor, keep_last: int | None = None
    ) -> AbstractContextManager[None]:
        """Inside, so many tokens of each row are prompt and the others generated ones; see `orthorank.context`."""
        keep = self._kept(keep_last)
        return phase_of(self, Phase(context=context_lengths(lengths), keep_last=keep))

    def _kept(self, keep_last: int | None) -> int:
        keep = self.config.keep_last if keep_last is None else keep_last
        check_integer("keep_last", keep, 0, MOST["keep_last"])
        return keep

    @contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        """Inside, ``watcher(layer, positions, call)`` is called with what each selected layer has chosen.

        ``positions`` are int32 ``[batch, most]``, ascending, -1 past a row's count; they count the tokens of the call,
        whose padding `call` knows. Calls in which all tokens are dense are left out.
        """
        with self.lock:
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
