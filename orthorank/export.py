"""A plan that only removes layers, as a smaller checkpoint of the same architecture that needs none of this package."""

import copy
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import writable_folder
from orthorank.config import OrthoRankConfig
from orthorank.families.known import decoder_of, family_of
from orthorank.hf.apply import check_plan, handle_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def export_pruned(model: "PreTrainedModel", config: OrthoRankConfig | str | os.PathLike[str], folder: Any) -> Path:
    """Write ``model`` without the layers that a plan removes to ``folder``, as an ordinary checkpoint.

    Layers are numbered anew, and what the configuration says of each layer is cut with them. The checkpoint loads in
    `AutoModel...`, in vLLM without the plugin and wherever else such models do, and its logits are those of the model
    with the plan applied. The model itself stays as it is; its tokenizer is saved by ``tokenizer.save_pretrained``.

    Args:
        model: as for `orthorank.apply`, with plain weights in memory and no plan applied.
        config: a plan, or where it is, as for `orthorank.apply`. Each of its layers is removed (keep ratio 0) or dense
            (1).
        folder: made where it is not there; no file of a checkpoint may be in it.

    Returns:
        The folder.

    Raises:
        OrthoRankError: the plan selects tokens, is corrected, removes no layer or all of them, or was made for another
            model; the weights are quantised, adapted or offloaded; a plan is applied; the folder cannot be written to
            or has a file of a checkpoint.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1))
        >>> smaller = export_pruned(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0), tempfile.mkdtemp())
        >>> AutoModelForCausalLM.from_pretrained(smaller).config.num_hidden_layers
        2
    """
    family_of(model)
    if isinstance(config, (str, os.PathLike)):
        config = OrthoRankConfig.from_pretrained(config, check=partial(check_plan, model))
    check_plan(model, config)
    removed = removed_layers(config)
    _check_weights(model)
    decoder: Any = decoder_of(model)
    if len(removed) == len(decoder.layers):
        raise OrthoRankError(f"the plan removes all {len(removed)} layers of the model; one must be left")
    where = writable_folder(folder, "folder")
    check_empty(where, "folder")
    before = decoder.layers, model.config
    from safetensors import SafetensorError  # what it raises on a full disk

    try:
        decoder.layers = nn.ModuleList(layer for i, layer in enumerate(decoder.layers) if i not in removed)
        model.config = without_layers(model.config, removed)
        model.save_pretrained(where)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OrthoRankError(f"folder {str(where)!r} cannot be written to: {reason}") from error
    finally:
        decoder.layers, model.config = before
    return where


def removed_layers(config: OrthoRankConfig) -> list[int]:
    """The layers that the plan removes, where it does nothing else.

    Raises:
        OrthoRankError: it selects tokens, has maps, or removes nothing.
    """
    if config.selecting:
        raise OrthoRankError(
            f"the plan selects tokens in layer {', '.join(map(str, config.selecting))} (keep_ratio "
            f"{config.ratio(config.selecting[0]):.4g}), and a checkpoint of an ordinary architecture always updates "
            "all of them: export a plan of removed layers (orthorank search --keep-ratio 0), or serve this one with "
            "orthorank vllm-args"
        )
    if config.correction is not None:
        raise OrthoRankError(
            f"the plan is corrected (layers {', '.join(map(str, config.correction.layers))}), and a checkpoint of an "
            "ordinary architecture has no place for maps: what they add depends on the token, and the first one gets "
            "none. Take the plan before orthorank correct, or serve this one with orthorank vllm-args"
        )
    if not (removed := [layer for layer in config.layers if config.ratio(layer) == 0]):
        raise OrthoRankError("the plan removes no layer (none has keep_ratio 0): with it the model is the dense one")
    return removed


def without_layers(config: "PreTrainedConfig", removed: list[int]) -> "PreTrainedConfig":
    """A copy of ``config`` for the model without these layers: fields with a value for each layer are cut, too.

    >>> from transformers import Qwen2Config
    >>> config = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2)
    >>> cut = without_layers(config, [0])
    >>> cut.num_hidden_layers, cut.max_window_layers, cut.layer_types
    (3, 1, ['full_attention', 'sliding_attention', 'sliding_attention'])
    """
    cut: Any = copy.deepcopy(config)
    total = cut.num_hidden_layers
    kept = [layer for layer in range(total) if layer not in removed]
    plain = _plain_mlps(cut)
    for name in _by_layer(cut):
        values = getattr(cut, name)
        setattr(cut, name, [values[layer] for layer in kept])
    if plain is not None:
        cut.mlp_only_layers, cut.decoder_sparse_step = [i for i, layer in enumerate(kept) if layer in plain], 1
    if getattr(cut, "max_window_layers", None) is not None:  # the layers before this one do not slide
        cut.max_window_layers = sum(layer < cut.max_window_layers for layer in kept)
    cut.num_hidden_layers = len(kept)
    return cut


def layers_alike(config: Any) -> bool:
    """Whether all layers of a model compute the same, but for their weights.

    Where they do not, some libraries go by a layer's number, which the export changes.

    >>> from transformers import Gemma2Config, LlamaConfig
    >>> layers_alike(LlamaConfig()), layers_alike(Gemma2Config())
    (True, False)
    """
    plain = _plain_mlps(config)
    mixed = plain is not None and 0 < len(plain) < config.num_hidden_layers
    return not mixed and all(len(set(getattr(config, name))) == 1 for name in _by_layer(config))


def _by_layer(config: Any) -> list[str]:
    """The fields that hold a list with one value for each layer."""
    total = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    return [name for name, value in lists.items() if "layer" in name and len(value) == total and name != MLPS]


MLPS = "mlp_only_layers"  # of the layers that have no experts, their numbers


def _plain_mlps(config: Any) -> set[int] | None:
    """Layers of a Qwen MoE that have no experts: it says so by numbers and by a step. None: the model is none."""
    step = getattr(config, "decoder_sparse_step", None)
    if not step:
        return None
    named = getattr(config, MLPS, None) or []
    return {layer for layer in range(config.num_hidden_layers) if layer in named or (layer + 1) % step}


def _check_weights(model: Any) -> None:
    """The weights of ``model`` are those that its class would save.

    Raises:
        OrthoRankError: they are quantised, adapted, elsewhere, or a plan is applied.
    """
    if handle_of(model) is not None:
        raise OrthoRankError("a plan is applied to this model; call handle.remove() first: the export needs it whole")
    if getattr(model, "peft_config", None):
        raise OrthoRankError(
            "the model has adapters, which the checkpoint would not hold: merge_and_unload() them first"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise OrthoRankError(
            "the model is quantised, by layer numbers that the export changes; load it as it was before"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise OrthoRankError("weights of the model are offloaded; load it without a device_map, on a CPU if need be")


# What `save_pretrained` of a model, and of a tokenizer, writes or replaces.
OF_MODEL = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
OF_TOKENIZER = (
    "tokenizer.*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def check_empty(folder: Path, name: str, patterns: Iterable[str] = OF_MODEL) -> None:
    """No file that an export writes is in ``folder``, which the argument ``name`` says.

    Raises:
        OrthoRankError: some are; nothing of a user's is overwritten.
    """
    found = sorted({file.name for pattern in patterns for file in folder.glob(pattern)})
    if found:
        raise OrthoRankError(
            f"{name} {str(folder)!r} has {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}, which an export "
            "writes and does not overwrite; name another folder, or delete it"
        )
