"""Where the sink forms: the layer l_sink after which position 0 stands out, and the layers that may select tokens.

The attention sink shows in the residual stream: from some layer on, the norm of the first token's state is one or two
orders of magnitude above that of the others (massive activations), whatever the first token is. That layer is found
from norms alone, with no attention weights:

    ratio_l = median over first tokens of  norm(h_0) / median_i norm(h_i),   h the input of layer l
    l_sink  = the layer with the largest jump ratio_{l+1} / ratio_l

and it counts as a sink when the jump is at least 5x and the ratio stays at least 10x for a quarter of the layers.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.common.texts import Bos, beginning_with, check_ids
from orthorank.families.known import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orthorank.stack.layers import LayerStack

MIN_JUMP = 5.0  # largest one-layer growth of the ratio; the false bumps below l_sink grow by 2 to 3
MIN_RATIO = 10.0  # the ratio afterwards, for a quarter of the layers; false bumps reach it for some first tokens only
MIN_FIRST_TOKENS = 16  # one first token alone can mislead: the early bump is twice as high for some as for others

# Any prose does: the sink's state depends on the first token alone, and the others only supply a median.
_PROSE = (
    "The harbour was quiet before sunrise, and only two boats had left when the wind turned. Maria counted the crates "
    "again, wrote 48 in her book, and asked whether anyone had seen the captain since yesterday evening. Nobody "
    "answered at once. A young sailor pointed at the lighthouse on the northern side of the bay, where a lamp still "
    "burned, although it should have been put out an hour ago. They walked there together along the wet stones, "
    "talking about prices, the coming winter, and how long the old engine would last without new parts."
)


@dataclass(frozen=True)
class SinkReport:
    """What `detect_sink` measured. Layer l's input is entry l; the last layer's output is entry ``num_layers``.

    Args:
        num_layers: decoder layers L of the model.
        sink_layer: l_sink, the layer whose output first shows the sink, counted from 0; None when there is no sink.
        reason: the verdict in a sentence.
        first_tokens, tokens: how many passages with different first tokens were measured, of how many tokens each.
        sink_norms, other_norms: norm of position 0, and median norm of the other positions: medians over the
            passages, L + 1 entries each.
        ratios, ratios_low, ratios_high: median, smallest and largest over the passages of the norm of position 0
            divided by the median norm of the others; L + 1 entries each.
        cos_others: mean cosine of the sink token with the other tokens of its passage, both after the input norm of
            layer l: L entries. It rises with depth after l_sink (paper, Observation 1).
        cos_self: median cosine of the sink token's normalised state in layer l with that in layer l + 1: L - 1
            entries. It stays near 1 after l_sink (paper, Observation 2).
        bos: whether every passage begins with the tokenizer's BOS, and their second tokens differ.
    """

    num_layers: int
    sink_layer: int | None
    reason: str
    first_tokens: int
    tokens: int
    sink_norms: tuple[float, ...]
    other_norms: tuple[float, ...]
    ratios: tuple[float, ...]
    ratios_low: tuple[float, ...]
    ratios_high: tuple[float, ...]
    cos_others: tuple[float, ...]
    cos_self: tuple[float, ...]
    bos: bool = False

    @property
    def applies(self) -> bool:
        """Whether OrthoRank can work here: there is a sink, and there are layers after it that may select tokens."""
        return self.sink_layer is not None and bool(_range_after(self.sink_layer, self.num_layers, 2))

    def to_dict(self) -> dict[str, Any]:
        """All fields and the verdict, as JSON stores them."""
        return dataclasses.asdict(self) | {"applies": self.applies}

    def __str__(self) -> str:
        return self.reason


@torch.no_grad()
def detect_sink(
    model: "PreTrainedModel",
    tokenizer: Any = None,
    *,
    input_ids: Tensor | None = None,
    first_tokens: int = MIN_FIRST_TOKENS,
    tokens: int = 64,
    bos: str = "auto",
) -> SinkReport:
    """Find the layer after which the model's first token is an attention sink (paper, sections 2 and 3.2).

    Norms and cosines of the residual stream are measured on short passages that begin with different tokens; where the
    tokenizer begins a text with a BOS token, which is the sink then, with that one and different second tokens. The
    model is only read.

    Args:
        model: a causal language model of a known family, without a plan applied.
        tokenizer: turns a built-in passage of English into ids when ``input_ids`` is not given. With neither, random
            ids from a fixed seed are used; they show the sink as well.
        input_ids: int64 ``[count]`` or ``[1, count]``, one long text; passages are cut out of it.
        first_tokens: passages, each with another first token; at least 16.
        tokens: length of a passage, at least 8.
        bos: with ``tokenizer``: ``"auto"``, ``"every"`` (passage), ``"first"`` or ``"none"``; see
            `orthorank.common.texts.Bos`.

    Returns:
        The report; ``report.sink_layer`` is None, with a reason, when no layer passes.

    Raises:
        OrthoRankError: an unknown family, a plan is applied, an argument is out of range, the text is too short, or it
            has ids that the model does not know.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> report = detect_sink(LlamaForCausalLM(config).eval(), tokens=8)  # random weights have no sink
        >>> report.sink_layer is None, report.applies, len(report.ratios)
        (True, False, 5)
    """
    from orthorank.stack.layers import LayerStack

    if first_tokens < MIN_FIRST_TOKENS:
        raise OrthoRankError(f"first_tokens is {first_tokens}; it must be at least {MIN_FIRST_TOKENS}")
    if tokens < 8:
        raise OrthoRankError(f"tokens is {tokens}; a passage needs at least 8 tokens")
    stack = LayerStack(model)
    where = None if tokenizer is None or input_ids is not None else Bos.of(bos, tokenizer)
    leading = None if where is None else where.leading
    ids = _ids(model, tokenizer, input_ids, first_tokens, tokens, where)
    check_ids(ids, model, "the tokenizer" if input_ids is None else "input_ids")
    passages = beginning_with(leading, _passages(ids, first_tokens, tokens - (leading is not None)))
    check_ids(passages, model)  # the BOS, too
    passages = passages.to(device_of(model))
    measured = _measure(stack, passages)
    layer, reason = find_sink_layer(measured["ratios"], measured["cos_self"])
    return SinkReport(stack.num_layers, layer, reason, first_tokens, tokens, **measured, bos=leading is not None)


def find_sink_layer(ratios: Sequence[float], cos_self: Sequence[float] = ()) -> tuple[int | None, str]:
    """l_sink and the reason, from the norm ratios of the inputs of layers 0 to L - 1 and the last output.

    Args:
        ratios: L + 1 ratios; see `SinkReport`.
        cos_self: L - 1 cosines of the sink with itself, for the wording alone.

    Returns:
        The layer (None: no sink) and a sentence that says why.

    Example:
        >>> find_sink_layer([1.0, 0.9, 150.0, 140.0, 120.0, 90.0, 60.0, 40.0, 9.0])[0]
        1
        >>> find_sink_layer([1.0, 2.0, 3.0, 3.0, 2.0])
        (None, 'no sink: the largest jump of the norm ratio is 2.0x, after layer 0; a sink needs at least 5x')
    """
    layers = len(ratios) - 1
    if layers < 1:
        raise OrthoRankError(f"ratios has {len(ratios)} entries; it must have one more than the model has layers")
    jumps = [after / max(before, 1e-30) for before, after in itertools.pairwise(ratios)]
    layer = max(range(layers), key=lambda i: jumps[i])  # the first of equals
    jump = f"from {ratios[layer]:.3g} to {ratios[layer + 1]:.3g}"
    if not jumps[layer] >= MIN_JUMP:  # NaN fails, too
        found = f"the largest jump of the norm ratio is {jumps[layer]:.1f}x, after layer {layer}"
        return None, f"no sink: {found}; a sink needs at least {MIN_JUMP:.0f}x"
    needed = max(1, layers // 4)
    held = 0
    while layer + 1 + held <= layers and ratios[layer + 1 + held] >= MIN_RATIO:
        held += 1
    if held < needed:
        found = (
            f"after layer {layer} the norm ratio jumps {jump} but is at least {MIN_RATIO:.0f} for {held} layers only"
        )
        return None, f"no sink: {found}; a sink stays for {needed}"
    reason = f"the sink forms in layer {layer} of {layers}: the first token's norm goes {jump} times that of the others"
    after = cos_self[layer + 1 : layer + 1 + needed]
    if after:
        kept = f"cosine from layer to layer {min(after):.3f} or more in the next {len(after)} layers"
        reason += f", and its normalised state then stays where it is ({kept})"
    return layer, reason


def candidate_layers(sink: SinkReport | int, num_layers: int | None = None, protect_last: int = 2) -> list[int]:
    """The layers that may select tokens: from ``l_sink + 1`` to the last one that is not protected.

    Args:
        sink: a report, or l_sink. 0 is no floor but the first layer (the range of SLEB with ``protect_last=1``).
        num_layers: layers L of the model; may be left out with a report.
        protect_last: layers at the end that stay dense: 2 by default, since the last layers of many models suffer most.

    Returns:
        Layer numbers ``l_sink + 1 .. L - 1 - protect_last``, counted from 0.

    Raises:
        OrthoRankError: no sink was found, or no layer is left.

    Example:
        >>> candidate_layers(11, 30) == list(range(12, 28))
        True
    """
    if isinstance(sink, SinkReport):
        if sink.sink_layer is None:
            raise OrthoRankError(
                f"{sink.reason}. To search nevertheless, give the layers, or the layer after which they begin, yourself"
            )
        num_layers = sink.num_layers if num_layers is None else num_layers
        sink = sink.sink_layer
    if num_layers is None:
        raise OrthoRankError("num_layers is missing; pass the model's number of layers, or a SinkReport")
    if not 0 <= sink < num_layers:
        raise OrthoRankError(f"the sink layer is {sink}; it must be from 0 to {num_layers - 1}")
    if not 0 <= protect_last < num_layers:
        raise OrthoRankError(f"protect_last is {protect_last}; it must be from 0 to {num_layers - 1}")
    layers = _range_after(sink, num_layers, protect_last)
    if not layers:
        raise OrthoRankError(
            f"no layer is left between the sink layer {sink} and the {protect_last} protected layers at the end of "
            f"{num_layers}; lower protect_last or the sink layer"
        )
    return list(layers)


def _range_after(sink_layer: int, num_layers: int, protect_last: int) -> range:
    return range(sink_layer + 1, num_layers - protect_last)


def _ids(
    model: "PreTrainedModel",
    tokenizer: Any,
    input_ids: Tensor | None,
    first_tokens: int,
    tokens: int,
    bos: Bos | None,
) -> Tensor:
    """The text to cut passages from, int64 ``[count]``."""
    if input_ids is not None:
        if input_ids.dim() == 2 and input_ids.shape[0] == 1:
            input_ids = input_ids[0]
        if input_ids.dim() != 1:
            raise OrthoRankError(f"input_ids has shape {list(input_ids.shape)}; it must be [tokens] or [1, tokens]")
        return input_ids.cpu()
    if tokenizer is not None:
        ids = tokenizer(_PROSE, add_special_tokens=bos is None or bos.policy == "first")["input_ids"]
        copies = 1 + (tokens + 4 * first_tokens) // max(1, len(ids))
        return torch.tensor(ids * copies)
    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (first_tokens * (tokens + 4),), generator=seeded)


def _passages(ids: Tensor, first_tokens: int, tokens: int) -> Tensor:
    """``[first_tokens, tokens]`` cuts of ``ids`` whose first tokens differ, spread over the text where it is long."""
    numbers = ids.tolist()
    last = len(numbers) - tokens
    for stride in (max(1, last // (2 * first_tokens)), 1):
        starts: list[int] = []
        seen: set[int] = set()
        at = 0
        while at <= last and len(starts) < first_tokens:
            if numbers[at] in seen:
                at += 1
                continue
            seen.add(numbers[at])
            starts.append(at)
            at += stride
        if len(starts) == first_tokens:
            return torch.stack([ids[start : start + tokens] for start in starts])
    raise OrthoRankError(
        f"input_ids has {len(numbers)} tokens with {len(starts)} passages of {tokens} tokens that begin differently; "
        f"{first_tokens} are needed: give a longer text or a smaller value of tokens"
    )


def _measure(stack: "LayerStack", passages: Tensor) -> dict[str, tuple[float, ...]]:
    """The figures of `SinkReport` by layer."""
    columns: defaultdict[str, list[float]] = defaultdict(list, cos_self=[])  # one layer alone has no next one
    inputs = stack.embed(passages)
    hidden = inputs.hidden_states
    sink_before: Tensor | None = None
    for layer in range(stack.num_layers + 1):
        norms = torch.linalg.vector_norm(hidden.float(), dim=-1)  # [passages, tokens]
        sinks, others = norms[:, 0], norms[:, 1:].quantile(0.5, dim=1)
        ratio = sinks / others
        columns["sink_norms"].append(sinks.quantile(0.5).item())
        columns["other_norms"].append(others.quantile(0.5).item())
        columns["ratios"].append(ratio.quantile(0.5).item())
        columns["ratios_low"].append(ratio.min().item())
        columns["ratios_high"].append(ratio.max().item())
        if layer == stack.num_layers:
            break
        normed = stack.normed(layer, hidden).float()
        sink = normed[:, 0]
        columns["cos_others"].append(torch.cosine_similarity(sink[:, None], normed[:, 1:], dim=-1).mean().item())
        if sink_before is not None:
            columns["cos_self"].append(torch.cosine_similarity(sink_before, sink, dim=-1).quantile(0.5).item())
        sink_before = sink
        hidden = stack.run(layer, hidden, inputs)
    return {name: tuple(values) for name, values in columns.items()}
