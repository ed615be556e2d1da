"""``orthorank vllm-args``: what vLLM is started with to serve a plan."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

PLAN = "Plan: a file, a folder, or org/name@revision on the Hub."
MODEL = "Folder of the checkpoint: the plan is checked against it. Needed where the plan does not say the model's type."
COUNT = (
    "With thresholds. read: each layer reads on the host how many tokens it selected; capacity: nothing waits, and "
    "matrix products have room for all tokens."
)
REUSE = (
    "prompt: later requests use cached blocks that every cold run would compute the same; all: also those of generated "
    "tokens, of forced last tokens and of partial windows."
)
ATTENTION = "auto, paged (this package's kernel over vLLM's cache) or portable (the backend's own kernel)."
SCORES = "own: every rank of a tensor-parallel group selects by its own scores; first rank: by those of the first one."
CACHING = "Whether requests may use blocks of earlier ones, where the plan's way to select allows it."
LENGTH = (
    "Tokens of the longest prompt and answer together. Default: the model's context. With top-k a step has room for as "
    "many, and the cache has less."
)
BLOCK = "Tokens of a block of the cache. Default: vLLM's choice, or what the plan's windows need."


def command(
    plan: Annotated[str, typer.Argument(help=PLAN, show_default=False)],
    model: Annotated[Path | None, typer.Option(help=MODEL)] = None,
    threshold_count: Annotated[str, typer.Option(help=COUNT)] = "read",
    reuse: Annotated[str, typer.Option(help=REUSE)] = "prompt",
    attention: Annotated[str, typer.Option(help=ATTENTION)] = "auto",
    scores: Annotated[str, typer.Option(help=SCORES)] = "own",
    prefix_caching: Annotated[bool, typer.Option(help=CACHING)] = True,
    block_size: Annotated[int | None, typer.Option(help=BLOCK)] = None,
    max_model_len: Annotated[int | None, typer.Option(help=LENGTH)] = None,
    python: Annotated[bool, typer.Option("--python", help="Print keyword arguments of vllm.LLM as JSON.")] = False,
) -> int:
    """Print the arguments with which vLLM serves a model with a plan.

    One line, quoted for a shell: args=$(orthorank vllm-args PLAN) && eval "vllm serve MODEL $args". Needs no vLLM.
    Refuses plans that no server can serve.
    """
    from orthorank.config import OrthoRankConfig
    from orthorank.serving.vllm.arguments import command_line, config_of, hints, vllm_arguments
    from orthorank.serving.vllm.serving import Serving

    serving = Serving(
        OrthoRankConfig.from_pretrained(plan),
        threshold_count=threshold_count,
        reuse=reuse,
        attention=attention,
        scores=scores,
    )
    config = None if model is None else config_of(model)
    arguments = vllm_arguments(
        serving, config, prefix_caching=prefix_caching, block_size=block_size, max_model_len=max_model_len
    )
    for hint in hints(serving, config, max_model_len):
        print(f"orthorank: {hint}", file=sys.stderr)  # the shell evaluates what goes to stdout
    print(json.dumps(arguments, indent=2) if python else command_line(arguments))
    return 0
