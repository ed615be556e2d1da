"""What vLLM is started with to serve a plan: keyword arguments of `vllm.LLM`, or the same on a command line."""

import json
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orthorank.common.errors import OrthoRankError, check_integers
from orthorank.common.files import user_path
from orthorank.serving.vllm.checks import model_obstacles, plan_obstacles
from orthorank.serving.vllm.hooks import ARCHITECTURES
from orthorank.serving.vllm.installed import left_out
from orthorank.serving.vllm.serving import Serving

BLOCK = 32  # tokens; every backend of vLLM takes blocks that are multiples of it
MOST_REQUESTS = 1024  # the largest of vLLM's defaults for --max-num-seqs: each has a token beside the window
LEAST_STEP = 2048  # the smallest of vLLM's defaults for --max-num-batched-tokens


def vllm_arguments(
    serving: Serving,
    config: Any = None,
    *,
    prefix_caching: bool = True,
    block_size: int | None = None,
    max_model_len: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, beside the model, with which it serves a plan.

    Args:
        serving: the plan, and how to serve it.
        config: the model's configuration (see `config_of`), against which the plan is checked. None: the plan says
            the model's type.
        prefix_caching: whether requests may use blocks of earlier ones, where the plan's way to select allows it.
        block_size: tokens of a block of the cache. None: vLLM's choice, or what the plan's windows need.
        max_model_len: the longest prompt and answer together. None: the model's context; see `hints` for what that
            costs with ``select="topk"``.

    Raises:
        OrthoRankError: no server can serve the plan, it is for another model, or windows do not fit into the blocks.

    Example:
        >>> from orthorank import OrthoRankConfig
        >>> plan = OrthoRankConfig(layers=[2], select="window", select_window=48, model_type="llama")
        >>> arguments = vllm_arguments(Serving(plan))
        >>> arguments["hf_overrides"]["architectures"], arguments["block_size"]
        (['OrthoRankLlamaForCausalLM'], 96)
    """
    for obstacle in plan_obstacles(serving):
        raise OrthoRankError(obstacle)
    overrides = {"architectures": [_architecture(serving, config)], "orthorank": serving.to_dict()}
    check_integers({"block_size": block_size, "max_model_len": max_model_len}, block_size=1, max_model_len=1)
    longest = {} if max_model_len is None else {"max_model_len": max_model_len}
    return {"hf_overrides": overrides} | _settings(serving, prefix_caching, block_size) | longest


def hints(serving: Serving, config: Any = None, max_model_len: int | None = None) -> Iterator[str]:
    """What to know of the arguments, in sentences.

    Example:
        >>> from orthorank import OrthoRankConfig
        >>> config = SimpleNamespace(max_position_embeddings=131072)
        >>> print(next(hints(Serving(OrthoRankConfig(layers=[2])), config)))  # doctest: +ELLIPSIS
        select is 'topk', which ranks a whole prompt at once, so chunked prefill and prefix caching are off: ...
    """
    topk = serving.plan.select == "topk" and bool(serving.plan.selecting)
    if topk:
        single = (
            ' (and "keep_multiple": 1, as counts of windows are not rounded)' if serving.plan.keep_multiple > 1 else ""
        )
        yield (
            "select is 'topk', which ranks a whole prompt at once, so chunked prefill and prefix caching are off: a "
            "long prompt holds up all answers, and no prompt uses what another one computed. Two plans with the same "
            f'layers keep both: one with "select": "window" and "select_window": 64{single} in its file, or one by '
            "thresholds, which `orthorank calibrate --plan PLAN` finds; `orthorank search --select window` looks for "
            "layers that suit windows"
        )
    if topk and max_model_len is None:
        context = getattr(config, "max_position_embeddings", None)
        room = f"up to {context:,} tokens, this model's context" if context else "up to the model's whole context"
        yield (
            f"since a prompt has to fit in one step, vLLM makes steps of {room} (max_num_batched_tokens, otherwise "
            "2,048 to 16,384 tokens), and takes the memory of their activations from the cache; pass --max-model-len "
            "with the tokens of your longest prompt and answer together"
        )
    if said := left_out(os.environ.get("VLLM_PLUGINS")):
        yield said


def config_of(model: Path) -> SimpleNamespace:
    """``config.json`` in the folder of a checkpoint, as far as plans are checked against it.

    Raises:
        OrthoRankError: there is none, or it is that of something else.
    """
    file = user_path("model", model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OrthoRankError(
            f"model is {str(model)!r}, and {file} cannot be read: {error.strerror}; name the folder of a checkpoint"
        ) from error
    except ValueError as error:
        raise OrthoRankError(f"{file} is not a JSON file: {error}; copy the checkpoint's config.json again") from error
    needed = ("model_type", "num_hidden_layers", "hidden_size")
    if not isinstance(config, dict) or any(name not in config for name in needed):
        raise OrthoRankError(f"{file} lacks one of {', '.join(needed)}: no model that OrthoRank serves has such a file")
    return SimpleNamespace(**config)


def command_line(arguments: dict[str, Any]) -> str:
    """Keyword arguments as ``vllm serve`` takes them, quoted for a shell.

    Args:
        arguments: of `vllm.LLM`, by name; those of `vllm_arguments`, and any others.

    Example:
        >>> print(command_line({"hf_overrides": {"orthorank": {"layers": [2]}}, "enable_prefix_caching": False}))
        --hf-overrides '{"orthorank":{"layers":[2]}}' --no-enable-prefix-caching
    """
    words: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            said = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)
            words += [f"--{option}", said]
    return shlex.join(words)


def _settings(serving: Serving, prefix_caching: bool, block_size: int | None) -> dict[str, Any]:
    """What the plan's way to select asks of vLLM."""
    plan, window, settings = serving.plan, serving.plan.select_window, dict[str, Any]()
    whole_prompts = plan.select == "topk" and bool(plan.selecting)
    if whole_prompts:
        settings["enable_chunked_prefill"] = False
    if whole_prompts or not prefix_caching:
        settings["enable_prefix_caching"] = False
    elif window is not None and serving.reuse == "prompt":
        block_size = _whole_windows(window, block_size)
    if block_size is not None:
        settings["block_size"] = block_size
    if window is not None and window + MOST_REQUESTS > LEAST_STEP:
        settings["max_num_batched_tokens"] = window + MOST_REQUESTS
    return settings


def _whole_windows(window: int, block_size: int | None) -> int:
    """A block that holds whole windows, so that no hit of the prefix cache ends inside one."""
    if block_size is None:
        return math.lcm(window, BLOCK)
    if block_size % window:
        raise OrthoRankError(
            f"block_size is {block_size} and select_window {window}: a hit of the prefix cache could end inside a "
            f"window; use a multiple of the window, such as {math.lcm(window, BLOCK)}, or switch the prefix cache off"
        )
    return block_size


def _architecture(serving: Serving, config: Any) -> str:
    if config is not None:
        for obstacle in model_obstacles(serving, config):
            raise OrthoRankError(obstacle)
        return ARCHITECTURES[config.model_type]
    model_type = serving.plan.model_type
    if model_type is None:
        raise OrthoRankError(
            "the plan does not say which type of model it is for (model_type); name the model's folder with --model"
        )
    if model_type not in ARCHITECTURES:
        raise OrthoRankError(f"the model's type is {model_type!r}; OrthoRank serves {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
