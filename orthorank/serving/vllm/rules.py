"""Rules that need no vLLM: where chunks of a prompt end, which tokens of it are computed alike in every request that
begins with them, which tokens of a request are its prompt, and which weights a plan has no use for.
"""

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from orthorank.common.errors import OrthoRankError

# In a request's ``extra_args``: how many of its tokens are the prompt; those behind were generated, and sent again.
PROMPT_TOKENS = "orthorank_prompt_tokens"
DENSE = "orthorank_dense"  # likewise, that its prompt is computed in every layer that is there
SALT = "orthorank dense:"  # with which its blocks are hashed
INPUT_NORM = ("input_layernorm", "attention_norm")  # in checkpoints of Hugging Face's format and of Mistral's
Weight = TypeVar("Weight")


def chunk_tokens(start: int, tokens: int, prompt: int, window: int) -> int:
    """How many of ``tokens`` a chunk from ``start`` on takes, so that it ends where a window or the prompt does.

    Example:
        >>> chunk_tokens(0, 100, prompt=300, window=64), chunk_tokens(256, 100, prompt=300, window=64)
        (64, 100)
    """
    end = start + tokens
    return tokens if end >= prompt else max(0, end // window * window - start)


def reusable_tokens(prompt: int, keep_last: int, window: int | None) -> int:
    """How many tokens at the beginning of a prompt are computed as in every other request that begins with them.

    Example:
        >>> reusable_tokens(300, 1, None), reusable_tokens(300, 1, 64), reusable_tokens(256, 1, 64)
        (299, 256, 192)
    """
    same = max(0, prompt - keep_last)
    return same if window is None else same // window * window


def same_tokens(request: Any, plan: Any) -> int:
    """How many tokens at the beginning of a request of vLLM are computed as in every other that shares their hashes.

    A dense prompt shares hashes with others of its kind alone, if a front end gave it their salt. Without the salt, as
    where a request comes straight to the engine, none of its blocks are of either kind; so it is the other way round.
    """
    first = getattr(request, "orthorank_prompt", None)
    own = prompt_tokens(request.num_prompt_tokens if first is None else first, params_of(request), plan.min_prompt)
    if (own < 0) != (request.cache_salt or "").startswith(SALT):
        return 0
    if own < 0 and first is None:  # every layer computes every token, the generated ones as a prompt's
        return sys.maxsize
    return reusable_tokens(abs(own), plan.keep_last, plan.select_window)


def prompt_tokens(tokens: int, params: Any, min_prompt: int = 0) -> int:
    """How many of a request's first ``tokens`` are its prompt: all, unless its parameters say how many.

    Negative: the prompt has so many, and is computed in every layer, as if it had been generated: its parameters say
    so, or it is below the plan's ``min_prompt``.

    Example:
        >>> from types import SimpleNamespace
        >>> prompt_tokens(12, None), prompt_tokens(12, SimpleNamespace(extra_args={"orthorank_prompt_tokens": 9}))
        (12, 9)
        >>> prompt_tokens(12, SimpleNamespace(extra_args={"orthorank_dense": True})), prompt_tokens(12, None, 13)
        (-12, -12)
    """
    extra = extra_of(params)
    said = extra.get(PROMPT_TOKENS)
    own = min(tokens, said) if type(said) is int and said > 0 else tokens
    return -own if extra.get(DENSE) or own < min_prompt else own


def extra_of(params: Any) -> dict[str, Any]:
    """What a request says beside vLLM's own parameters, those of sampling or of pooling."""
    return getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}


def params_of(request: Any) -> Any:
    """The parameters of a request of vLLM: those of sampling, or of pooling."""
    return request.pooling_params if request.sampling_params is None else request.sampling_params


def dense_salt(salt: str | None) -> str:
    """What the blocks of a dense prompt are hashed with, where its request has that ``cache_salt``.

    Example:
        >>> dense_salt(None), dense_salt("a user's")
        ('orthorank dense:', "orthorank dense:a user's")
    """
    return SALT + (salt or "")


def check_request(extra_args: dict[str, Any] | None, salt: str | None = None) -> None:
    """Before a request is taken.

    Raises:
        OrthoRankError: it says a number of prompt tokens that is none, a switch that is none, or the ``cache_salt`` of
            dense prompts.

    Example:
        >>> check_request({"orthorank_prompt_tokens": "9"})
        Traceback (most recent call last):
        orthorank.common.errors.OrthoRankError: orthorank_prompt_tokens is '9'; it must be the number of the prompt's \
own tokens, at least 1: those behind it were generated
    """
    extra = extra_args or {}
    if (dense := extra.get(DENSE)) not in (None, False, True):
        raise OrthoRankError(
            f"{DENSE} is {dense!r}; it must be true (or 1) for a prompt that every layer computes, or false"
        )
    if salt is not None and salt.startswith(SALT):
        raise OrthoRankError(f"cache_salt is {salt!r}; what begins with {SALT!r} is of dense prompts: use another one")
    said = extra.get(PROMPT_TOKENS)
    if said is not None and (type(said) is not int or said < 1):
        raise OrthoRankError(
            f"{PROMPT_TOKENS} is {said!r}; it must be the number of the prompt's own tokens, at least 1: those behind "
            "it were generated"
        )


def without_layers(
    weights: Iterable[tuple[str, Weight]], removed: Collection[int], normed: Collection[int] = ()
) -> Iterator[tuple[str, Weight]]:
    """Weights by name, without those of the decoder layers ``removed``, but with the input norms of ``normed``.

    Example:
        >>> names = ["model.layers.1.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight", "model.norm.weight"]
        >>> [name for name, _ in without_layers([(name, 0) for name in names], [1])]
        ['model.layers.10.mlp.up_proj.weight', 'model.norm.weight']
    """
    for name, weight in weights:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.(\w+)", name)
        if layer is None or (index := int(layer[1])) not in removed or (index in normed and layer[2] in INPUT_NORM):
            yield name, weight
