"""Models with random weights of a real model's shape: speed can be measured on them, quality cannot."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orthorank.config import OrthoRankConfig

FOLDER = Path(__file__).parent / "configs"
SPARSITIES = (0.1, 0.2)
KEEP_RATIO = 1 / 3


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package: files as the hub's config.json, with a model's shapes.

    >>> list(shipped_configs())
    ['llama-2-7b', 'llama-3-8b', 'mistral-7b', 'qwen2.5-7b']
    """
    return {file.name.removesuffix(".json"): file for file in sorted(FOLDER.glob("*.json"))}


def random_model(
    config: str | Path,
    *,
    device: "str | torch.device",
    dtype: "str | torch.dtype | None",
    attention: str = "sdpa_causal",
    layers: int | None = None,
    seed: int = 0,
) -> "PreTrainedModel":
    """A causal language model in eval mode with random weights, drawn on the device where it runs.

    Args:
        config: a name of `shipped_configs`, a config.json as the hub has it, or a folder with one.
        device: where; dtype: of the weights, as `orthorank.models.load_model` takes it.
        attention: transformers' ``attn_implementation``; ``"sdpa_causal"`` is
            `orthorank.stack.causal_attention`, the same in eager, captured and compiled models.
        layers: decoder layers to make; None: as many as the configuration has.
        seed: of the weights. The state of PyTorch's own generators stays as it was.

    Returns:
        The model. It has no name, so a plan that was found for a model of this shape fits.

    Raises:
        OrthoRankError: the configuration cannot be read or is of a family without a spec, or layers is out of range.

    Example:
        >>> import json, tempfile
        >>> fields = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        ...           "num_hidden_layers": 4, "num_attention_heads": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = (Path(folder) / "config.json").write_text(json.dumps(fields))
        ...     model = random_model(folder, device="cpu", dtype="float32", layers=2)
        >>> model.config.num_hidden_layers, model.config._attn_implementation
        (2, 'sdpa_causal')
    """
    import torch
    from transformers import AutoModelForCausalLM

    from orthorank.models import pick_device, pick_dtype
    from orthorank.stack.causal_attention import NAME, register_causal_attention

    place = pick_device(str(device))
    read = read_config(config, layers)
    if attention == NAME:
        register_causal_attention()
    options = {"dtype": pick_dtype(dtype, place), "attn_implementation": attention}
    with torch.random.fork_rng([place] if place.type == "cuda" else []), torch.device(place):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(read, **options)
        except ValueError as error:
            raise OrthoRankError(
                f"config {str(config)!r} with attention {attention!r} is refused by transformers: {error}"
            ) from error
    return model.to(place).eval()


def read_config(config: str | Path, layers: int | None = None) -> Any:
    """The transformers configuration that ``config`` names, with ``layers`` decoder layers. See `random_model`."""
    from transformers import AutoConfig

    from orthorank.families.known import FAMILIES, known_families

    file = _file(config)
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
        kind = fields.pop("model_type") if isinstance(fields, dict) else None
        if not isinstance(kind, str):
            raise ValueError("it is no JSON object with a name as its model_type")
    except (OSError, ValueError, KeyError) as error:
        raise OrthoRankError(
            f"config {str(config)!r} cannot be read as a model's configuration ({type(error).__name__}: {error}); name "
            f"a config.json as the hub has it, or one of {', '.join(shipped_configs())}"
        ) from error
    if kind not in FAMILIES:
        raise OrthoRankError(
            f"config {str(config)!r} is of type {kind!r}, which has no spec; known are: {known_families()}"
        )
    if layers is not None:
        most = fields.get("num_hidden_layers", layers)
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= most:
            raise OrthoRankError(f"layers is {layers!r}; it must be an integer from 1 to the model's {most}")
        fields["num_hidden_layers"] = layers
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:layers]
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # transformers' checks of the fields have errors of their own
        raise OrthoRankError(f"config {str(config)!r} is refused by transformers: {error}") from error


def unsearched_plans(num_layers: int) -> "dict[str, OrthoRankConfig]":
    """Layer pruning and OrthoRank plans at 10 and 20 % nominal sparsity, whose layers no search has chosen.

    Random weights give a search nothing to find, and for speed it does not matter which layers select. The rule: the
    last layers before the final one, as many as `orthorank.config.layer_count` says. A sparsity of less than
    one layer is left out.

    >>> {name: plan.layers for name, plan in unsearched_plans(20).items()}  # doctest: +NORMALIZE_WHITESPACE
    {'layer pruning 10 %': [17, 18], 'orthorank 10 %': [16, 17, 18],
     'layer pruning 20 %': [15, 16, 17, 18], 'orthorank 20 %': [13, 14, 15, 16, 17, 18]}
    """
    from orthorank.config import OrthoRankConfig, layer_count

    plans = {}
    for sparsity in SPARSITIES:
        for kind, ratio in (("layer pruning", 0.0), ("orthorank", KEEP_RATIO)):
            if count := layer_count(num_layers, sparsity, ratio):
                layers = list(range(num_layers - 1 - count, num_layers - 1))
                plans[f"{kind} {100 * sparsity:.0f} %"] = OrthoRankConfig(layers=layers, keep_ratio=ratio)
    return plans


def _file(config: str | Path) -> Path:
    if (shipped := shipped_configs().get(str(config))) is not None:
        return shipped
    path = user_path("config", str(config))
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise OrthoRankError(
            f"config {str(config)!r} is no file; name a config.json as the hub has it, or one of "
            f"{', '.join(shipped_configs())}"
        )
    return path
