"""By what tokens are ranked: the criteria that a plan may name, those of your own among them.

A plan holds a name and never runs code. `register_criterion` gives a function its name in this process; an entry point
of the group ``orthorank.criteria`` does so in every process of an environment that has the package installed.
"""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, check_integer, shown, type_of

if TYPE_CHECKING:
    from torch import Tensor

BUILT_IN = ("orthogonal", "inverse", "random", "cosine", "prenorm")
FUSED = {"orthogonal": "inner", "cosine": "cosine"}  # ranked by a score of `rms_norm_score`, under its name there
GROUP = "orthorank.criteria"
NEEDS = ("scores", "keys", "sink_keys", "queries", "sink_queries", "positions", "layer", "seed")
_NAME = re.compile(r"[A-Za-z_][\w.:+-]*", re.ASCII)


@dataclass(frozen=True)
class Criterion:
    """What `register_criterion` was told."""

    name: str
    score: Callable[..., "Tensor"]
    pointwise: bool
    needs: tuple[str, ...] = ()
    normed: bool = True

    def __call__(self, x: "Tensor", sink: "Tensor", valid: "Tensor", **needed: Any) -> "Tensor":
        """The values, float32 ``[batch, tokens]``, contiguous, where ``x`` is.

        Raises:
            OrthoRankError: the function gave something else.
        """
        import torch

        values = self.score(x, sink, valid, **needed)
        found = type_of(values)
        if isinstance(values, torch.Tensor):
            of = values.dtype, values.shape, values.device, values.layout
            if of == (torch.float32, x.shape[:2], x.device, torch.strided):
                return values.contiguous()
            kind = str(values.dtype) if values.layout == torch.strided else f"{values.layout} {values.dtype}"
            found = f"a {kind.replace('torch.', '')} tensor of shape {list(values.shape)} on {values.device}"
        raise OrthoRankError(
            f"criterion {self.name!r} gave {found} for states of shape {list(x.shape)} on {x.device}; it must give a "
            f"float32 tensor of shape {list(x.shape[:2])} on the same device, one number for each token"
        )


_REGISTERED: dict[str, Criterion] = {}


def register_criterion(
    name: str,
    fn: Callable[..., "Tensor"],
    *,
    pointwise: bool,
    needs: Sequence[str] = (),
    normed: bool = True,
    hidden_size: int = 64,
) -> None:
    """From now on, in this process, plans may rank tokens by ``fn`` under ``criterion=name``.

    ``fn(x, sink, valid)`` gives float32 ``[batch, tokens]``; the tokens with the smallest values are updated. The sink
    is never selected, NaN ranks last, and what it gives for tokens that are not ``valid`` is not looked at.

    - ``x``: ``[batch, tokens, hidden]``, the states behind the layer's input norm, in the model's dtype.
    - ``sink``: ``[batch, hidden]``, the same of each row's first token, which may be in an earlier chunk.
    - ``valid``: bool ``[batch, tokens]``, False for padding and for generated tokens, which are not ranked.

    It is tried here, on a CPU and on random states: a row alone must give what it gives in a padded batch.

    Args:
        name: what plans call it: letters, digits and ``_ . : + -``. Registering the function again, after an edit in a
            notebook, replaces it; another function needs another name.
        fn: changes none of its arguments, and is deterministic.
        pointwise: whether the value of a token depends on this token and on the sink alone. What looks at other tokens
            is refused with ``select="threshold"``, for prompts in chunks over a cache, and in vLLM.
        needs: what ``fn`` gets beside, as keyword arguments of these names:

            - ``"scores"``: float32 ``[batch, tokens]``, the paper's score ``abs(<sink, x>)``; costs nothing.
            - ``"keys"``: ``[batch, kv_heads, tokens, head_dim]``, not rotated; ``"sink_keys"``: ``[batch, kv_heads,
              head_dim]``; ``"queries"`` and ``"sink_queries"`` likewise. Each costs a projection of all tokens.
            - ``"positions"``: int64 ``[batch or 1, tokens]``, places in the row, cached tokens counted, padding not.
            - ``"layer"``: the layer's number; ``"seed"``: the plan's.
        normed: False: ``x`` and ``sink`` are states before the norm.
        hidden_size: of the random states, for a function that takes one size only.

    Raises:
        OrthoRankError: the name is taken or cannot be one, ``fn`` fails, or a row alone differs from the row in a
            batch; the message has the difference.

    Example:
        >>> def far_from_sink(x, sink, valid):
        ...     return -(x.float() - sink.float()[:, None]).norm(dim=-1)
        >>> register_criterion("far_from_sink", far_from_sink, pointwise=True)
        >>> from orthorank import OrthoRankConfig
        >>> OrthoRankConfig(layers=[2], criterion="far_from_sink").criterion
        'far_from_sink'
    """
    from orthorank.common.criteria_check import check_rows

    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OrthoRankError(
            f"name is {shown(name)}; it must begin with a letter or _, and have letters, digits and _ . : + - alone"
        )
    if name in BUILT_IN:
        raise OrthoRankError(f"name is {name!r}, which is one of the criteria that are there; choose another one")
    if not callable(fn):
        raise OrthoRankError(f"fn is {type_of(fn)}; it must be a function of x, sink and valid")
    if not isinstance(pointwise, bool):
        raise OrthoRankError(f"pointwise is {shown(pointwise)}; it must be True or False")
    if not isinstance(needs, (list, tuple, set)) or (wrong := [need for need in needs if need not in NEEDS]):
        given = f"{list(needs)}, with {wrong[0]!r}" if isinstance(needs, (list, tuple, set)) else shown(needs)
        raise OrthoRankError(f"needs is {given}; it must be a list of {', '.join(map(repr, NEEDS))}")
    if not isinstance(normed, bool):
        raise OrthoRankError(f"normed is {shown(normed)}; it must be True or False")
    check_integer("hidden_size", hidden_size, 1, 2**20)
    if not normed and set(needs) - {"positions", "layer", "seed"}:
        raise OrthoRankError("needs has scores, keys or queries and normed is False; these are of normed states")
    known = _REGISTERED.get(name)
    if known is not None and _home(known.score) != _home(fn):
        raise OrthoRankError(
            f"name is {name!r}, which is registered as {'.'.join(_home(known.score))}; choose another name for "
            f"{'.'.join(_home(fn))}"
        )
    criterion = Criterion(name, fn, pointwise, tuple(needs), normed)
    check_rows(name, criterion, pointwise, criterion.needs, hidden_size)
    add(criterion)


def add(criterion: Criterion) -> None:
    """Register ``criterion`` without trying it."""
    _REGISTERED[criterion.name] = criterion


def code_of(name: str) -> dict[str, str]:
    """What kept results must say beside the plan that they are of, lest an edited criterion gets those of before.

    Returns:
        ``criterion_code``, a hash of the file that the registered function is in; of a built-in one nothing.
    """
    if name in BUILT_IN:
        return {}
    criterion = find(name)
    function = inspect.unwrap(_function(criterion.score))
    try:
        text = Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError):  # of a notebook, or no Python
        text = repr(_constants(getattr(function, "__code__", None))).encode()
    how = repr((_home(criterion.score), criterion.pointwise, criterion.needs, criterion.normed))
    return {"criterion_code": hashlib.sha256(how.encode() + text).hexdigest()[:16]}


def _constants(code: Any) -> list[Any]:
    if not isinstance(code, CodeType):
        return [code]
    return [code.co_code.hex(), code.co_names, *map(_constants, code.co_consts)]


def _function(fn: Any) -> Any:
    """The function inside partials, or the class of an object that is called."""
    while isinstance(fn, partial):
        fn = fn.func
    return fn if hasattr(fn, "__qualname__") else type(fn)


def _home(fn: Any) -> tuple[str, str]:
    function = _function(fn)
    return str(function.__module__), str(function.__qualname__)


def names() -> tuple[str, ...]:
    """What plans may name here: the criteria that are there, then those that are registered."""
    return (*BUILT_IN, *(name for name in _REGISTERED if name not in BUILT_IN))


def check_criterion(name: object) -> None:
    """A plan may name ``name``; entry points of that name are loaded.

    Raises:
        OrthoRankError: it is not registered; the message says how that is done.
    """
    legal = f"it may be {' or '.join(map(repr, names()))}"
    if not isinstance(name, str):
        raise OrthoRankError(f"criterion is {shown(name)}; {legal}")
    if name in BUILT_IN or name in _REGISTERED or _installed(name):
        return
    module, colon, _ = name.partition(":")
    raise OrthoRankError(
        f"criterion is {shown(name)}; {legal}, or one of your own, which is not registered here: import "
        f"{module if colon else 'the module'} and call orthorank.register_criterion({shown(name)}, ...), give "
        f"--criterion {name if colon else 'module:function'} to a command that takes it, or install the package that "
        f"offers it as an entry point of {GROUP}"
    )


def find(name: str) -> Criterion:
    """The criterion that is registered as ``name`` (of the built-in ones, those of `orthorank.hf.ablations`).

    Raises:
        OrthoRankError: it is not registered.
    """
    if name not in _REGISTERED:
        check_criterion(name)
    return _REGISTERED[name]


def is_pointwise(name: str) -> bool:
    """Whether the rank of a token depends on this token and on the sink alone."""
    return name in BUILT_IN or find(name).pointwise


def check_pointwise(name: str, with_what: str) -> None:
    """``name`` can be used ``with_what``, where tokens are looked at one by one.

    Raises:
        OrthoRankError: it looks at other tokens.
    """
    if not is_pointwise(name):
        raise OrthoRankError(
            f"criterion is {name!r}, which was registered with pointwise=False: it looks at all tokens of a prompt, so "
            f"it cannot be used with {with_what}"
        )


def given(option: str) -> str:
    """What ``--criterion`` says: a name, or ``module:function``, which is imported here, from the current folder, too.

    If the module registers that function when it is imported, plans hold the name it gives it. Otherwise the function
    is registered as ``module:function``, as one that is not pointwise and needs nothing.

    Returns:
        The name for plans.

    Raises:
        OrthoRankError: there is no such module or function, or `register_criterion` refuses it.
    """
    module, colon, attribute = option.partition(":")
    if not colon or option in _REGISTERED:
        check_criterion(option)
        return option
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # of the module's own code, too
        raise OrthoRankError(
            f"criterion is {shown(option)}, which cannot be imported ({type(error).__name__}: {error}); it must be a "
            "name or module:function, where the module lies in the current folder or is installed"
        ) from error
    finally:
        sys.path.remove(here)
    for name, criterion in _REGISTERED.items():
        if criterion.score is found:
            return name
    register_criterion(option, found, pointwise=False)
    return option


def _installed(name: str) -> bool:
    """Whether an installed package offers the criterion; its module is imported then, which registers it."""
    points: list[EntryPoint] = [point for point in entry_points(group=GROUP) if point.name == name]
    for point in points:
        try:
            point.load()
        except (Exception, SystemExit) as error:
            raise OrthoRankError(
                f"criterion is {name!r}, and the entry point of {GROUP} that offers it, {point.value}, cannot be "
                f"imported ({type(error).__name__}: {error}); install that package anew, or name another criterion"
            ) from error
        if name not in _REGISTERED:
            raise OrthoRankError(
                f"the entry point {name!r} of {GROUP} is {point.value}, and importing that registers no criterion of "
                f"this name; its module must call orthorank.register_criterion({name!r}, ...)"
            )
    return bool(points)
