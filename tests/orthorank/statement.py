"""OrthoRank stated another way, to test against: run the dense layer on everything, keep the selected rows of it.

A selected token's update depends on its own query and on the keys and values of all tokens, which is what the dense
layer computes for that token. So ``h' = where(selected, dense_layer(h), h)``, with no sparse attention and no gather,
whatever the family. Nothing of the package is used.

In this order: how tokens rank, how many and which are selected; the groups of a packed step; a model under a plan.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rule = Callable[[Tensor], Tensor]  # from a row's scores, fp64 [tokens], to the updated tokens, bool [tokens]


def hash_of(seed: int, layer: int, position: int) -> int:
    """The 32-bit hash behind ``criterion="random"``, in the integers of Python; all three are below 2^32."""

    def mixed(x: int) -> int:
        x ^= x // 2**16
        x = x * 0x21F0AAAD % 2**32
        x ^= x // 2**15
        x = x * 0x735A2D97 % 2**32
        return x ^ x // 2**15

    key = 0
    for number in (seed, layer):
        key = mixed(((key ^ number) + 0x9E3779B9) % 2**32)
    return mixed(mixed((position + 0x9E3779B9) % 2**32) ^ key)


def ranks(criterion: str, h: Tensor, x: Tensor, seed: int = 0, layer: int = 0, sink: Tensor | None = None) -> Tensor:
    """The smaller, the sooner selected: float64 ``[tokens]``; ``h`` and ``x`` ``[tokens, hidden]`` are before and after
    the norm. ``sink``: the state to compare with, if it is not the first token's."""
    if criterion == "random":
        return torch.tensor([hash_of(seed, layer, i) // 2**8 for i in range(len(x))]).double()
    states = (h if criterion == "prenorm" else x).double()
    sink = states[0] if sink is None else sink.double()
    products = (states @ sink).abs()
    if criterion == "cosine":
        return products / (states.norm(dim=-1) * sink.norm())
    return -products if criterion == "inverse" else products


def count(tokens: int, ratio: float, forced: int = 0, sink: bool = True, update_sink: bool = False) -> int:
    """How many of ``tokens`` are updated: their share, rounded down, and at least the ``forced`` ones. The sink, where
    it is among them, counts as a token; with ``update_sink`` it is updated beside the forced ones, otherwise never."""
    k = math.floor(ratio * tokens + 1e-6)
    if update_sink:
        return min(tokens, max(k, forced + sink))
    return min(tokens - sink, max(k, forced)) if forced else k


def chosen(
    scores: Sequence[float], k: int, sink: int | None = 0, forced: Collection[int] = (), update_sink: bool = False
) -> list[int]:
    """Places of the ``k`` smallest, in ascending order: by (score, place), NaN after all numbers, forced ones before
    others, and the sink's place after all or, with ``update_sink``, before all."""

    def turn(i: int) -> tuple[int, bool, bool, float, int]:
        nan = math.isnan(scores[i])
        return (i == sink) * (-1 if update_sink else 1), i not in forced, nan, 0.0 if nan else scores[i], i

    return sorted(sorted(range(len(scores)), key=turn)[:k])


def selected_mask(
    scores: Tensor, k: int, keep_last: int = 0, update_sink: bool = False, sink_inside: bool = True
) -> Tensor:
    """Bool ``[tokens]``: the k smallest of ``scores``; the last ``keep_last`` are forced, token 0 is the sink.

    ``sink_inside`` False: token 0 is one like the others, as in a later chunk of a prompt.
    """
    tokens = len(scores)
    forced = range(max(0, tokens - keep_last), tokens)
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[chosen(scores.tolist(), k, 0 if sink_inside else None, forced, update_sink)] = True
    return mask


def below(tau: float) -> Rule:
    """Every token but the sink that scores less than ``tau``."""
    return lambda scores: (scores < tau) & (torch.arange(len(scores)) > 0)


class Row(NamedTuple):
    """A request in a step: tokens computed before, tokens here, tokens of its prompt."""

    cached: int
    tokens: int
    prompt: int


@dataclass
class Group:
    """Tokens that select together."""

    request: int
    behind: bool  # the prompt: dense
    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    forced: set[int] = field(default_factory=set)  # rows

    @property
    def sink(self) -> int | None:
        """The row of the request's first token, if it is here and part of a prompt."""
        return None if self.behind or self.positions[0] != 0 else self.rows[0]

    def count(self, ratio: float, update_sink: bool = False) -> int:
        size = len(self.rows)
        return size if self.behind else count(size, ratio, len(self.forced), self.sink is not None, update_sink)

    def chosen(self, k: int, ranks: Sequence[float], update_sink: bool = False) -> list[int]:
        """``ranks``: of all rows of the step."""
        sink = None if self.sink is None else 0
        forced = [i for i, row in enumerate(self.rows) if row in self.forced]
        return [self.rows[i] for i in chosen([ranks[row] for row in self.rows], k, sink, forced, update_sink)]

    def below(self, threshold: float, ranks: Sequence[float]) -> list[int]:
        if self.behind:
            return self.rows
        return [row for row in self.rows if row != self.sink and (row in self.forced or ranks[row] < threshold)]


def groups(rows: Sequence[Row], keep_last: int = 0, window: int | None = None) -> list[Group]:
    """All groups of a step, in the order of their tokens."""
    found: dict[tuple[int, str, int], Group] = {}
    at = 0
    for request, (cached, tokens, prompt) in enumerate(rows):
        for position in range(cached, cached + tokens):
            behind = position >= prompt
            number = 0 if behind or window is None else position // window
            key = request, "behind" if behind else "prompt", number
            group = found.setdefault(key, Group(request, behind))
            group.rows.append(at)
            group.positions.append(position)
            if not behind and position >= prompt - keep_last:
                group.forced.add(at)
            at += 1
    return list(found.values())


def by_request(chosen: Callable[[Group], list[int]], found: list[Group], requests: int) -> list[list[int]]:
    """The rows that each request updates."""
    rows: list[list[int]] = [[] for _ in range(requests)]
    for group in found:
        rows[group.request] += chosen(group)
    return rows


def windows_mask(scores: Tensor, window: int, ratio: float, keep_last: int = 0, update_sink: bool = False) -> Tensor:
    """The smallest of each window of ``window`` tokens; ``keep_last`` counts in the windows where it falls."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    for group in groups([Row(0, len(scores), len(scores))], keep_last, window):
        mask[group.chosen(group.count(ratio, update_sink), scores.tolist(), update_sink)] = True
    return mask


@contextmanager
def updating(
    model: Any,
    layers: Collection[int],
    choose: Callable[[int, Tensor, Tensor], Tensor],
    kv: str = "all",
    maps: Mapping[int, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """Inside, each of ``layers`` of the dense ``model`` updates the tokens that ``choose(layer, h, x)`` says, bool
    ``[batch, tokens]``; ``h`` and ``x`` ``[batch, tokens, hidden]`` are before and after the norm, if there is one in
    front. ``kv="selected"``, of one row: they attend to each other alone. ``maps``, of unpadded rows: down, up, bias of
    what a layer adds to the tokens that it leaves out, the sink excepted."""

    def hook(layer: int) -> Any:
        def select(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
            h, output = args[0], output[0] if isinstance(output, tuple) else output
            x = module.input_layernorm(h) if hasattr(module, "input_layernorm") else h
            mask = choose(layer, h.detach(), x.detach())
            if kv == "selected" and mask.any():
                output = output.clone()
                output[mask] = _among_themselves(module, h, mask[0], kwargs)[0]
            other = h
            if maps is not None:
                down, up, bias = (part.double() for part in maps[layer])
                added = (h.double() + x.double() @ down.T @ up.T + bias).to(h.dtype)
                other = torch.cat([h[:, :1], added[:, 1:]], dim=1)
            return torch.where(mask[..., None], output, other)

        return model.model.layers[layer].register_forward_hook(select, with_kwargs=True)

    hooks = [hook(layer) for layer in layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _among_themselves(module: Any, h: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The dense layer on the selected rows of ``h`` alone, at their own places."""
    at = mask.nonzero().flatten()
    config, index = module.self_attn.config, module.self_attn.layer_idx
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[index] == "sliding_attention"
    window = getattr(config, "sliding_window", None) if slides else None
    distance = at[:, None] - at[None, :]
    visible = (distance >= 0) & (distance < (window or len(mask)))
    cos, sin = kwargs["position_embeddings"]
    kwargs = kwargs | {
        "position_embeddings": (cos[:, at], sin[:, at]),
        "attention_mask": torch.where(visible, 0.0, -torch.inf)[None, None],
        "position_ids": at[None],
    }
    return type(module).forward(module, h[:, at], **kwargs)  # not the hooks, of which the caller is one


@torch.no_grad()
def logits_by_rule(
    model: Any,
    ids: Tensor,
    rules: dict[int, Rule],
    criterion: str = "orthogonal",
    *,
    seed: int = 0,
    sign: float = 1.0,
    kv: str = "all",
    sinks: str = "first",
    seen: dict[int, list[int]] | None = None,
    maps: Mapping[int, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits ``[1, tokens, vocabulary]`` of one unpadded row ``ids`` ``[1, tokens]``, each layer of ``rules`` updating
    the tokens that its rule says. ``seen``, if given, gets the selected positions of each layer; ``maps``: as above."""

    def choose(layer: int, h: Tensor, x: Tensor) -> Tensor:
        scores = sign * ranks(criterion, h[0], x[0], seed, layer)
        if sinks == "auto":
            alike = ranks("cosine", h[0], h[0] if criterion == "prenorm" else x[0]) >= 0.75
            scores = scores.masked_fill(alike, torch.inf)
        mask = rules[layer](scores)
        if seen is not None:
            seen[layer] = mask.nonzero().flatten().tolist()
        return mask[None]

    with updating(model, rules, choose, kv, maps):
        return model(ids, use_cache=False).logits


def logits(
    model: Any,
    ids: Tensor,
    layers: Collection[int],
    k: int,
    keep_last: int = 0,
    *,
    update_sink: bool = False,
    chunks: list[tuple[int, int]] | None = None,
    **how: Any,
) -> Tensor:
    """The same, of which ``layers`` update ``k`` tokens, the sink counted where it is updated; ``how``: as above.

    ``chunks``: tokens and k of each chunk, if the prompt comes in several; since later tokens change nothing for
    earlier ones, one pass with the tokens that each chunk selects is the same.
    """

    def rule(scores: Tensor) -> Tensor:
        parts, masks = chunks or [(len(scores), k)], []
        for number, (part, (_, most)) in enumerate(zip(scores.split([n for n, _ in parts]), parts, strict=True)):
            last = keep_last if number == len(parts) - 1 else 0
            masks.append(selected_mask(part, most, last, update_sink, sink_inside=number == 0))
        return torch.cat(masks)

    return logits_by_rule(model, ids, dict.fromkeys(layers, rule), **how)


class DenseRows:
    """A plan over whole batches, padded, and over caches. Inside, ``layers`` update the selected tokens alone.

    Args:
        layers: which; ratio: share of each row's tokens, per call; keep_last: tokens at each row's end updated anyway.
        criterion: ``"orthogonal"``, ``"inverse"``, ``"prenorm"`` or ``"cosine"``.
    """

    def __init__(
        self, model: Any, layers: list[int], ratio: float, keep_last: int = 0, criterion: str = "orthogonal"
    ) -> None:
        self.model, self.ratio, self.keep_last, self.criterion = model, ratio, keep_last, criterion
        self.mask, self.past, self.dense = torch.empty(0), 0, False  # of the call that runs
        self.sinks: dict[tuple[int, int], Tensor] = {}  # by layer and row
        self.inside = updating(model, layers, self._choose)

    def __enter__(self) -> "DenseRows":
        self.inside.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside.__exit__(kind, value, trace)

    def __call__(self, ids: Tensor, mask: Tensor, cache: Any = None, dense: bool = False) -> Tensor:
        """Logits of the next tokens ``ids`` ``[batch, tokens]``; mask: of all columns so far; dense: decoded tokens."""
        self.mask, self.past, self.dense = mask, mask.shape[1] - ids.shape[1], dense
        return call(self.model, ids, mask, cache)

    def _choose(self, layer: int, h: Tensor, x: Tensor) -> Tensor:
        found = torch.full(h.shape[:2], self.dense)
        for row, valid in enumerate(self.mask[:, self.past :].bool()):
            if self.dense or not valid.any():
                continue
            before, normed = h[row, valid], x[row, valid]
            first = (layer, row) not in self.sinks
            sink = self.sinks.setdefault((layer, row), (before if self.criterion == "prenorm" else normed)[0])
            k = count(len(normed), self.ratio, self.keep_last, first)
            scores = ranks(self.criterion, before, normed, sink=sink)
            found[row, valid] = selected_mask(scores, k, self.keep_last, sink_inside=first)
        return found


def call(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    """Logits of one call, with positions counted from each row's first token."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    kwargs: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
    return model(ids, attention_mask=mask, position_ids=positions, **kwargs).logits


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Largest difference below ``relative`` times the largest absolute expected value."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    worst = (actual - expected).abs().max() / expected.abs().max()
    assert worst < relative, f"differs by {worst:.2e} of the scale, allowed {relative:.0e}"
