"""What `generate()` makes of a patched model when it is not the patched model's own.

A plan on an inner part (the language model of one that reads images, a decoder without its head) does not see the
`generate()` of what is around it, but can tell from the stack that one is running. As long as that decodes plainly,
each call says by itself what it is: the first holds the prompt, every other one a single token over the cache.
"""

import dataclasses
import inspect
import sys
from functools import cache
from types import CodeType, FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from orthorank.calls.reading import Phase
from orthorank.common.errors import OrthoRankError, type_of
from orthorank.common.patching import Patch

PREPARES = "prepare_inputs_for_generation"


def phase_inside(
    phase: Phase, model: Any, decoder: Any, keep_last: int, tokens: int, filled: Any, inputs: dict[str, Any]
) -> Phase:
    """``phase``, or what it has to be inside a `generate()`.

    Args:
        model: what the plan was applied to; decoder: whose forward is called.
        keep_last: the plan's; tokens: of each row of the call; filled: the call's cache, or None; inputs: its other
            arguments, with ``use_cache``.

    Raises:
        OrthoRankError: `generate()` calls it in a way that does not say which tokens are prompt.
    """
    if phase.prompt:
        if not _is_aside(phase, model, filled):
            return _with_added(phase, model, tokens, filled)
        phase = Phase()
    if phase.prompt == 0 or phase.context is not None or (caller := generating(decoder)) is None:
        return phase
    cached = 0 if filled is None else int(filled.get_seq_length())
    if caller.aside and not caller.guides:
        return phase
    if filled is None and not inputs["use_cache"]:
        how = "without a cache, so that the prompt and what was generated come together"
    elif caller.drafts:
        how = f"on {tokens} tokens, some of which are drafts (assisted decoding or prompt lookup)"
    elif cached > 0 and tokens > 1:
        how = f"on {tokens} tokens over {cached} cached ones"
    else:
        return dataclasses.replace(phase, keep_last=keep_last) if cached == 0 else phase
    raise OrthoRankError(
        f"generate() of a {caller.name} calls {type_of(decoder)} with a plan applied {how}: which of them are "
        "prompt is not known here; apply the plan to the model whose generate() you call, or let it decode plainly, "
        "with a cache and one token at a time"
    )


def _is_aside(phase: Phase, model: Any, filled: Any) -> bool:
    """Whether a call inside the model's own `generate()` is not one of its steps, but of a scorer or of guidance.

    Its steps are prepared one by one. A loop of the caller's own (``custom_generate``) may prepare none, or go on with
    the cache of a step that was.
    """
    if phase.prepared or not isinstance(vars(model).get(PREPARES), Patch):
        return False
    return phase.prepared is False and (filled is None or filled is not phase.cache)


def _with_added(phase: Phase, model: Any, tokens: int, filled: Any) -> Phase:
    """Of a `generate()` of the patched model's own, with what is added to its prompt behind its back.

    PEFT's prompt tuning puts its vectors before the prompt after the patch has prepared the first call.
    """
    if phase.given is None and not isinstance(vars(model).get(PREPARES), Patch):
        raise OrthoRankError(
            f"the {PREPARES} of the model was replaced around that of the plan (PEFT's prompt methods do so while they "
            "generate), so that which tokens are prompt is not known: apply the plan to the model before PEFT wraps "
            "it, or give generate() the prompt as inputs_embeds"
        )
    added = 0 if phase.given is None else tokens - phase.given
    phase.given = None  # it was of this call: others may come before the next is prepared (guidance, scorers)
    if phase.prepared:
        phase.prepared = False
    if added > 0 and (filled is None or int(filled.get_seq_length()) == 0):
        phase.added = added
    return phase


_INSIDE: WeakKeyDictionary[Any, WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()  # found once: models are large


def _is_inside(decoder: Any, model: Any) -> bool:
    known = _INSIDE.setdefault(model, WeakKeyDictionary())
    if decoder not in known:
        known[decoder] = any(module is decoder for module in model.modules())
    return known[decoder]


class _Caller(NamedTuple):
    """Whose `generate()` is running.

    Args:
        name: the model's class.
        drafts: whether it has drafts checked.
        aside: whether a logits processor or a stopping criterion makes the call; guides: whether it is transformers'
            own guidance, which generates from a second prompt beside the first.
    """

    name: str
    drafts: bool
    aside: bool
    guides: bool


class _Codes(NamedTuple):
    generates: CodeType
    drafts: CodeType | None
    aside: tuple[CodeType, ...]
    guides: CodeType | None


@cache
def _codes() -> _Codes:
    """Of `generate()`, of what checks drafts in it, of what it asks between its steps, and of its guidance."""
    from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation import logits_process

    guidance = getattr(logits_process, "UnbatchedClassifierFreeGuidanceLogitsProcessor", None)
    guiding = getattr(guidance, "get_unconditional_logits", None)
    drafting = getattr(GenerationMixin, "_assisted_decoding", None)
    return _Codes(
        inspect.unwrap(GenerationMixin.generate).__code__,
        drafting and inspect.unwrap(drafting).__code__,
        tuple(inspect.unwrap(kind.__call__).__code__ for kind in (LogitsProcessorList, StoppingCriteriaList)),
        guiding and inspect.unwrap(guiding).__code__,
    )


def generating(decoder: Any) -> _Caller | None:
    """Who generates in this thread and has ``decoder`` inside, or None.

    Another model's `generate()` may call this one for its own purposes, to score or to guide.
    """
    if "transformers.generation.utils" not in sys.modules:
        return None
    codes, drafts, aside, guides = _codes(), False, False, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        drafts = drafts or frame.f_code is codes.drafts
        aside = aside or frame.f_code in codes.aside
        guides = guides or frame.f_code is codes.guides
        if frame.f_code is codes.generates:
            model = frame.f_locals.get("self")
            if _is_inside(decoder, model):
                return _Caller(type(model).__name__, drafts, aside, guides)
            drafts = aside = guides = False
        frame = frame.f_back
    return None
