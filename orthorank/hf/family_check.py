"""Whether a family's spec says what its layers do: selected rows against the dense layer's, on a tiny copy of a model.

A spec that was never tested may leave out a window, a bias or a scale, and the model would go on, slightly wrong. So a
model is made of the same classes and the same kind of configuration, small and with random weights, and each of its
layers is run twice: as it is, and from its parts with half of the tokens selected. What a selected token becomes must
be its row of the dense layer's output.
"""

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthorank.calls.context import ForwardContext
from orthorank.common.errors import OrthoRankError, type_of
from orthorank.common.patching import forward_of
from orthorank.config import OrthoRankConfig
from orthorank.families import Family
from orthorank.families.intact import TakenApart
from orthorank.families.known import TESTED, decoder_of, family_of, layers_of
from orthorank.hf.layer import selected_forward
from orthorank.hf.selection import prepared

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ALLOWED = 1e-4  # of the largest that a layer adds; float32 differs by 1e-6 at most
ROWS, TOKENS, WINDOW, LAYERS = 2, 24, 7, 4
MOST = 2**26  # parameters of the copy
GAIN = 2.0  # weights large enough that a cap of scores, or a bias, makes a difference
# What is made small, where the configuration has it and more of it. Widths of heads stay: tables go by them.
SIZES = {
    "vocab_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
}
_passed: set[tuple[type, Family, str]] = set()


def checked_family(model: "PreTrainedModel") -> Family:
    """`family_of` of the model; where the package's tests do not hold its spec, after `check_family`."""
    family = family_of(model)
    if model.config.get_text_config().model_type not in TESTED and _key(model, family) not in _passed:
        check_family(model)
    return family


def check_family(model: "PreTrainedModel", config: "PretrainedConfig | None" = None) -> float:
    """Compare the spec of ``model``'s family with the layers of a tiny copy of the model; about a tenth of a second.

    The copy is of the same classes. Its configuration is the model's with few layers (one at least of each kind that
    its lists name), few heads, small widths, a small vocabulary and windows of 7 tokens; its weights are random, biases
    and norms too. `apply` and a search do this by themselves for registered families, once for each configuration.

    Not seen: what differs in training alone (dropouts), after more than 24 tokens, or in half precision.

    Args:
        model: any size, on any device; its weights are not read.
        config: a small configuration of the same kind, where the model's own cannot be made small by the names of its
            fields. What passes with it counts as passed for ``model``.

    Returns:
        The largest difference, as a share of what the layer adds to its input: below 1e-4.

    Raises:
        OrthoRankError: the family has no spec, or the spec is wrong: which layer, and by how much.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1))
        >>> check_family(model) < 1e-5
        True
    """
    family = family_of(model)
    if config is not None and not hasattr(config, "get_text_config"):
        raise OrthoRankError(
            f"config is {type_of(config)}; it must be a small configuration of transformers, of the model's "
            "own class, or None: then one is made of the model's"
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        decoder = _tiny(model, family, config)
        worst = max(_differences(decoder, family))
    _passed.add(_key(model, family))
    return worst


def _key(model: Any, family: Family) -> tuple[type, Family, str]:
    fields = model.config.get_text_config().to_dict()
    return type(decoder_of(model)), family, json.dumps(fields, sort_keys=True, default=str)


def _tiny(model: Any, family: Family, config: Any) -> Any:
    """The decoder of the copy, in float32 and with eager attention."""
    decoder = decoder_of(model)
    kind = next(kind for kind in type(decoder).__mro__ if not kind.__module__.startswith("torch."))  # as FSDP wraps it
    try:
        small = copy.deepcopy(config) if config is not None else shrunk(model.config.get_text_config())
        small._attn_implementation = "eager"
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(small).parameters())
        if size > MOST:
            raise OrthoRankError(f"it would have {size:,} parameters")
        made = kind(small).float().eval()
    except Exception as error:
        raise _unchecked(family, kind, "made of the model's configuration", error) from error
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1 or "norm" in name or "bias" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.copy_(GAIN * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return made


def _unchecked(family: Family, kind: type, what: str, error: Exception) -> OrthoRankError:
    return OrthoRankError(
        f"the spec of {family.name} cannot be checked: no small {kind.__name__} can be {what} ({type(error).__name__}: "
        f"{error}); make a small configuration of the same kind and call orthorank.check_family(model, config=...)"
    )


def shrunk(config: Any) -> Any:
    """A copy of ``config`` with small sizes: see `check_family`."""
    small = copy.deepcopy(config)
    for name, size in SIZES.items():
        if isinstance(value := getattr(small, name, None), int) and not isinstance(value, bool) and value > size:
            setattr(small, name, size)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    few = min(kv_heads, 2)
    small.num_attention_heads = few * min(heads // kv_heads, 2)
    if getattr(config, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = few
    if heads * head_dim == config.hidden_size:
        small.hidden_size = small.num_attention_heads * head_dim
    else:
        small.hidden_size = min(config.hidden_size, 128)
    if getattr(small, "pad_token_id", None) is not None:
        small.pad_token_id = 0
    _keep_layers(small, config.num_hidden_layers)
    return small


def _keep_layers(small: Any, layers: int) -> None:
    """Leave the first layers, and the first of each kind that lists of the configuration tell apart."""
    lists = {
        name: value
        for name, value in vars(small).items()
        if isinstance(value, (list, tuple)) and len(value) == layers > LAYERS
    }
    kinds = [repr([value[layer] for value in lists.values()]) for layer in range(layers)]
    kept = sorted({*(kinds.index(kind) for kind in kinds), *range(min(LAYERS, layers))})
    for name, value in lists.items():
        setattr(small, name, [value[layer] for layer in kept])
    small.num_hidden_layers = len(kept)


def _differences(decoder: Any, family: Family) -> list[float]:
    """Of each layer: the largest difference between selected rows and the dense layer's; raises where it is one."""
    seen: list[tuple[Tensor, Any, Any]] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states, kwargs.get("position_embeddings"), output))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in decoder.layers]
    try:
        decoder(torch.randint(1, decoder.config.vocab_size, (ROWS, TOKENS)), use_cache=False)
    except Exception as error:
        raise _unchecked(family, type(decoder), "run", error) from error
    for hook in hooks:
        hook.remove()
    return [_difference(family, index, layer, *seen[index]) for index, layer in enumerate(layers_of(decoder))]


def _difference(family: Family, index: int, layer: Any, states: Tensor, tables: Any, dense: Any) -> float:
    which = f"layer {index} of a tiny copy, {type_of(layer)}"
    if tables is None or not isinstance(dense, Tensor):
        lacks = "is not handed position_embeddings" if tables is None else f"returns {type_of(dense)}"
        raise OrthoRankError(
            f"{family.name} models cannot follow a plan: {which}, {lacks}; layers as transformers 5 has them are "
            "handed cos and sin by that name and return the hidden states alone"
        )
    chosen: list[Tensor] = []
    plan = OrthoRankConfig(layers=[index], keep_ratio=0.5)
    call = ForwardContext(ROWS, TOKENS, 0, TOKENS, watcher=lambda _, positions, __: chosen.append(positions))
    try:
        parts = TakenApart(family, layer, index, forward_of(layer)).check()
        actual = selected_forward(parts, index, plan, prepared(call, plan, states.device), states, tables)
    except Exception as error:
        raise OrthoRankError(
            f"the spec of {family.name} does not fit: {which}, cannot be run from its parts ({type(error).__name__}: "
            f"{error})"
        ) from error
    rows = chosen[0].long()[..., None].expand(-1, -1, states.shape[-1])
    expected, added = dense.gather(1, rows), (dense - states).gather(1, rows)
    worst = float((actual.gather(1, rows) - expected).abs().max() / added.abs().max())
    if not worst <= ALLOWED:
        raise OrthoRankError(
            f"the spec of {family.name} is wrong: {which}, gives selected tokens other states than the dense layer "
            f"does, by {worst:.1e} of what the layer adds (allowed are {ALLOWED:.0e}). Compare its forward with every "
            "field of orthorank.Family: norms and what is added to their weights, order of the parts, rotary "
            "embedding, window, caps and scales"
        )
    return worst
