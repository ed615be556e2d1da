"""Floating-point operations of one prefill, dense and with a plan: the speed-up that a plan could give at best.

What is counted: the matrix products of every layer and the language-model head, a multiply-add as 2. For ``N`` tokens
of which a selected layer updates ``k``, with hidden size D, query width Q = heads * head_dim, key width
C = kv_heads * head_dim and MLP width M:

    keys, values             2 * (2 N D C)             all tokens, also in a selected layer
    queries, output          2 * (2 k D Q)             k = N in a dense layer
    scores, weighted sum     2 * (2 Q * k * N / 2)     causal: a query meets half of the keys on average
    gated MLP                3 * (2 k D M)             the same width everywhere (2 without a gate), or
    experts                  2 k D E + e * 3 * (2 k D M_e) + 3 * (2 k D M_s) + 2 k D
    map of rank r            2 * (2 N r D)             of a corrected layer: all tokens, also where it is removed
    head                     2 D * vocabulary          once (`logits_to_keep=1`) or for N tokens

The experts' line is the router over E experts, e of which each token passes, each M_e wide, and, in models that have
it, an expert for all tokens, M_s wide, with its gate.

Norms, rotary embedding, softmax, token scores, gather and scatter are not counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, check_choice, check_integer
from orthorank.families.known import FAMILIES
from orthorank_kernels import keep_count

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

LOGITS = ("last", "all")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Dimensions:
    """The sizes that FLOPs depend on, read from a Hugging Face configuration.

    ``mlp``: FLOPs of the MLP of each layer for one token.
    """

    layers: int
    hidden: int
    query: int
    key: int
    mlp: tuple[float, ...]
    vocabulary: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> "Dimensions":
        """Read ``config`` (of a model, or its text part).

        Raises:
            OrthoRankError: a size is missing, or the architecture is not a known one.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        sizes = {name: _size(text, name) for name in _SIZES}
        model_type = getattr(text, "model_type", None)
        if model_type is not None and model_type not in FAMILIES:
            raise OrthoRankError(
                f"the model is of type {model_type!r}; what its layers compute is known for {', '.join(FAMILIES)} only"
            )
        heads = sizes["num_attention_heads"]
        head_dim = getattr(text, "head_dim", None) or sizes["hidden_size"] // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(
            layers=sizes["num_hidden_layers"],
            hidden=sizes["hidden_size"],
            query=heads * head_dim,
            key=kv_heads * head_dim,
            mlp=tuple(_mlp(text, layer) for layer in range(sizes["num_hidden_layers"])),
            vocabulary=sizes["vocab_size"],
            windows=_windows(text, sizes["num_hidden_layers"]),
        )

    def layer(self, index: int, tokens: int, updated: int) -> float:
        """FLOPs of one layer that updates ``updated`` of ``tokens`` tokens and keeps keys and values of all."""
        window = self.windows[index]
        seen = tokens / 2  # keys that a query meets on average
        if window is not None and window < tokens:
            seen = window * (tokens - window / 2) / tokens
        keys_values = 4 * tokens * self.hidden * self.key
        projections = 4 * updated * self.hidden * self.query
        attention = 4 * self.query * updated * seen
        return keys_values + projections + attention + updated * self.mlp[index]

    def map(self, tokens: int, rank: int) -> float:
        """FLOPs of one layer's map of ``rank``, for all ``tokens``."""
        return 4.0 * tokens * rank * self.hidden


def prefill_flops(
    config: Any,
    tokens: int,
    layers: Iterable[int] = (),
    keep_ratio: float | Mapping[int, float] = 1.0,
    logits: str = "last",
    ranks: Mapping[int, int] | None = None,
    keep_multiple: int = 1,
) -> float:
    """FLOPs of processing one prompt; a batch takes as many times more.

    Args:
        config: the Hugging Face configuration of a model of a known family (`orthorank.FAMILIES`).
        tokens: prompt length.
        layers: the layers that select tokens, counted from 0.
        keep_ratio: share of tokens that they update; 0 removes them, keys and values included. See `keep_count`. A
            mapping gives each of them its own, as `OrthoRankConfig.ratios` does.
        logits: ``"last"``: the head runs on one token (``logits_to_keep=1``); ``"all"``: on every token.
        ranks: of the maps of corrected layers, by layer, as `OrthoRankConfig.ranks` has them.
        keep_multiple: as in `OrthoRankConfig`.

    Returns:
        Floating-point operations, a multiply-add counted as 2.

    Raises:
        OrthoRankError: an argument out of range, or a configuration without the sizes.

    Example:
        >>> from transformers import LlamaConfig
        >>> dense = prefill_flops(LlamaConfig(num_key_value_heads=32), 2048)  # the defaults are Llama-2-7B's
        >>> f"{dense / 1e12:.1f} TFLOP"
        '27.6 TFLOP'
        >>> removed = {"tokens": 2048, "layers": [9], "keep_ratio": 0}
        >>> with_map = prefill_flops(LlamaConfig(), **removed, ranks={9: 64})
        >>> with_map - prefill_flops(LlamaConfig(), **removed) == 2 * (2 * 2048 * 64 * 4096)
        True
    """
    sizes = Dimensions.of(config)
    check_integer("tokens", tokens, 1)
    check_choice("logits", logits, LOGITS)
    selected = set(layers)
    if unknown := [layer for layer in sorted(selected) if not 0 <= layer < sizes.layers]:
        raise OrthoRankError(f"layers holds {unknown[0]}; the model has layers 0 to {sizes.layers - 1}")
    if unknown := [layer for layer in ranks or {} if layer not in selected]:
        raise OrthoRankError(f"ranks has the key {unknown[0]}; maps are of the layers given, {sorted(selected)}")
    given = keep_ratio.values() if isinstance(keep_ratio, Mapping) else [keep_ratio]
    if wrong := [ratio for ratio in given if not 0 <= ratio <= 1]:
        raise OrthoRankError(f"keep_ratio is {wrong[0]}; it must be from 0 (layers removed) to 1 (dense)")
    ratios = keep_ratio if isinstance(keep_ratio, Mapping) else dict.fromkeys(selected, keep_ratio)
    if unknown := sorted(selected - set(ratios)):
        raise OrthoRankError(
            f"keep_ratio has no key {unknown[0]}; a mapping must give one ratio for each of the layers"
        )
    total = 2.0 * sizes.hidden * sizes.vocabulary * (1 if logits == "last" else tokens)
    for index in range(sizes.layers):
        if (ratio := ratios[index] if index in selected else 1.0) > 0:
            total += sizes.layer(index, tokens, keep_count(tokens, ratio, multiple=keep_multiple))
    return total + sum(sizes.map(tokens, rank) for rank in (ranks or {}).values())


def flop_speedup(
    config: Any,
    tokens: int,
    layers: Iterable[int],
    keep_ratio: float | Mapping[int, float],
    logits: str = "last",
    ranks: Mapping[int, int] | None = None,
) -> float:
    """Dense FLOPs divided by the plan's: the speed-up if time were proportional to FLOPs.

    Args:
        config, tokens, layers, keep_ratio, logits, ranks: as for `prefill_flops`.

    Example:
        >>> from transformers import LlamaConfig
        >>> llama2_7b = LlamaConfig(num_key_value_heads=32)
        >>> round(flop_speedup(llama2_7b, 2048, range(20, 29), 1/3), 3)  # nine layers: 20 % nominal sparsity
        1.187
        >>> round(flop_speedup(llama2_7b, 2048, range(20, 29), 1/3, logits="all"), 3)
        1.183
    """
    dense = prefill_flops(config, tokens, logits=logits)
    return dense / prefill_flops(config, tokens, layers, keep_ratio, logits, ranks)


def plan_flops(
    config: Any,
    tokens: int,
    plan: "OrthoRankConfig",
    logits: str = "last",
    ranks: Mapping[int, int] | None = None,
) -> float:
    """`prefill_flops` of a plan, with all of it that counts: layers, ratios, maps, and keep counts in multiples.

    Args:
        config, tokens, logits: as for `prefill_flops`.
        plan: for this model. ranks: of maps that it has not yet; None: its own.

    Example:
        >>> from transformers import LlamaConfig
        >>> from orthorank import OrthoRankConfig
        >>> plan = OrthoRankConfig(layers=[9], keep_ratio=1/3, keep_multiple=128)  # 768 of 2,048 tokens
        >>> plan_flops(LlamaConfig(), 2048, plan) == prefill_flops(LlamaConfig(), 2048, [9], 768 / 2048)
        True
    """
    ranks, ratios = ranks_at(plan, tokens, ranks), plan.ratios
    if tokens < plan.min_prompt:
        ratios = {layer: 1.0 if ratio else 0.0 for layer, ratio in ratios.items()}
    return prefill_flops(config, tokens, plan.layers, ratios, logits, ranks, plan.keep_multiple)


def ranks_at(plan: "OrthoRankConfig", tokens: int, ranks: Mapping[int, int] | None = None) -> dict[int, int]:
    """Of the maps that a prompt of ``tokens`` meets, by layer: below ``min_prompt`` those of removed layers alone.

    Args:
        plan, tokens, ranks: as for `plan_flops`.
    """
    known = plan.ranks if ranks is None else dict(ranks)
    if tokens >= plan.min_prompt:
        return known
    return {layer: rank for layer, rank in known.items() if plan.ratio(layer) == 0}


def plan_speedup(config: Any, tokens: int, plan: "OrthoRankConfig") -> float:
    """`flop_speedup` of a plan.

    Args:
        config, tokens, plan: as for `plan_flops`.
    """
    return prefill_flops(config, tokens) / plan_flops(config, tokens, plan)


def layer_cost(config: Any, tokens: int, keep_ratio: float) -> float:
    """FLOPs of a selected layer (layer 0 stands for all) as a share of those of a dense one.

    Keys and values of all tokens are paid in full, so the share is above ``keep_ratio``; less so with grouped queries.

    Args:
        config: as for `prefill_flops`. tokens: prompt length. keep_ratio: share of them that the layer updates.

    Example:
        >>> from transformers import LlamaConfig
        >>> round(layer_cost(LlamaConfig(num_key_value_heads=32), 2048, 1/3), 2)
        0.44
    """
    sizes = Dimensions.of(config)
    if tokens < 1 or not 0 <= keep_ratio <= 1:
        raise OrthoRankError(f"tokens is {tokens} and keep_ratio {keep_ratio}; they must be above 0 and from 0 to 1")
    if keep_ratio == 0:
        return 0.0
    return sizes.layer(0, tokens, keep_count(tokens, keep_ratio)) / sizes.layer(0, tokens, tokens)


def _size(text: Any, name: str) -> int:
    size = getattr(text, name, None)
    if not isinstance(size, int):
        raise OrthoRankError(
            f"the model's configuration ({getattr(text, 'model_type', type(text).__name__)}) has {name} = {size!r}; "
            "FLOPs are counted for decoders with integer sizes under the names of Llama"
        )
    return size


def _mlp(text: Any, layer: int) -> float:
    """FLOPs of the MLP, or of the experts, of one layer for one token."""
    hidden = text.hidden_size
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if experts and getattr(text, "model_type", None) not in MIXTURES:
        raise OrthoRankError(
            f"the model is a mixture of experts; those whose FLOPs are counted are of type {', '.join(MIXTURES)}"
        )
    alternating = (layer + 1) % getattr(text, "decoder_sparse_step", 1) == 0
    if not experts or layer in (getattr(text, "mlp_only_layers", None) or ()) or not alternating:
        family = FAMILIES.get(getattr(text, "model_type", "llama"))
        return (6.0 if family is None or family.gated else 4.0) * hidden * text.intermediate_size
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    gate = 2.0 * hidden if shared else 0.0
    return 2.0 * hidden * experts + 6.0 * hidden * (width * _size(text, "num_experts_per_tok") + shared) + gate


def _windows(text: Any, layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer, in tokens; None: the layer sees everything."""
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
