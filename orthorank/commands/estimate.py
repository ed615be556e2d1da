"""``orthorank estimate``: what a plan could save on a model, before anything is downloaded."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands import number
from orthorank.commands.screen import RichScreen, console, print_json, table_of
from orthorank.common import format as form
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import user_path
from orthorank.report import words

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

CONFIG = (
    "A config.json or a folder with one; llama-2-7b, llama-3-8b, mistral-7b or qwen2.5-7b; the Hub id of a model in "
    "the local cache; or a model type."
)
PROMPT = "Tokens of a prompt; may be given several times. Default: 512, 2048, 8192, 32768, up to the model's context."
SPARSITY = "Share of token updates to leave out, over all layers; no layers need be chosen yet. Default: 0.1."
PLAN = "A plan file or its folder, instead of a sparsity."
KEEP_RATIO = "With --sparsity: share of the tokens that a changed layer still updates; 0 removes it. Default: 1/3."
RANK = "Count correction maps of this rank in each changed layer. Default: the plan's maps."


def command(
    config: Annotated[str, typer.Argument(help=CONFIG, show_default=False)],
    prompt: Annotated[list[int] | None, typer.Option(help=PROMPT)] = None,
    sparsity: Annotated[str | None, typer.Option(help=SPARSITY)] = None,
    plan: Annotated[str | None, typer.Option(help=PLAN)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    rank: Annotated[int | None, typer.Option(help=RANK)] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the cache: bfloat16, float16 or float32.")] = "bfloat16",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> int:
    """What a plan could save on a model: FLOPs by prompt length, memory, and the size of its maps.

    From the model's configuration alone: no weights are read, nothing is downloaded and nothing is measured. The FLOP
    bound is the speed-up of a prefill if time were proportional to floating-point operations.
    """
    share, ratio = number("sparsity", sparsity), number("keep_ratio", keep_ratio)
    given = None if plan is None else _read(plan)

    from orthorank.models import SHORT
    from orthorank.speed.estimates import estimate, find_config

    found = {"config": config} | estimate(
        find_config(config),
        prompts=prompt or None,
        plan=given,
        sparsity=share,
        keep_ratio=ratio,
        rank=rank,
        dtype=SHORT.get(dtype, dtype),
    )
    if json:
        print_json(found)
    else:
        _show(RichScreen(console()), found, named=given is not None)
    return 0


def _read(plan: str) -> "OrthoRankConfig":
    from orthorank.config import OrthoRankConfig

    if not user_path("plan", plan).exists():
        raise OrthoRankError(f"plan is {plan!r}, and there is no such file or folder; nothing is downloaded here")
    return OrthoRankConfig.from_pretrained(plan)


def _show(screen: RichScreen, found: dict[str, Any], named: bool) -> None:
    plan, maps = found["plan"], found["maps"]
    screen.heading(f"{found['config']}: {found['model_type']}, {found['num_hidden_layers']} layers")
    weights = ", ".join(f"{size(found['weight_bytes'][name])} in {name}" for name in ("bfloat16", "float32"))
    screen.say(f"{found['parameters'] / 1e9:,.2f} billion weights: {weights}")
    which = f" ({form.layers(plan['layers'])})" if named else ""
    title = words.plan_title(plan | {"name": "orthorank" if plan["keep_ratio"] else "layer-pruning"})
    screen.say(f"{title}{which}; {form.percent(plan['nominal_sparsity'])} of all token updates are left out")
    if not named and not found["alike"]:
        screen.say("Its layers differ: the last ones before the final one stand for those that a search would choose.")
    if maps is not None:
        screen.say(
            f"maps of rank {maps['rank']} in {len(maps['layers'])} layers: {size(maps['bytes'])}, "
            f"{maps['flops_per_token'] / 1e6:,.2f} MFLOP a token, counted below"
        )
    drawn = table_of("prompt", "dense TFLOP", "plan TFLOP", "FLOP bound", "dense cache", "plan cache", left=0)
    for row in found["rows"]:
        drawn.add_row(
            f"{row['prompt']:,}",
            f"{row['dense_flops'] / 1e12:,.3f}",
            f"{row['plan_flops'] / 1e12:,.3f}",
            f"{row['flop_bound']:.3f}x",
            size(row["dense_cache_bytes"]),
            size(row["plan_cache_bytes"]),
        )
    screen.table(drawn)
    screen.say(
        "FLOP bound: dense FLOPs over the plan's, the speed-up of a prefill at best. Cache: keys and values of one "
        f"prompt in {found['dtype']}."
    )


def size(count: float) -> str:
    """Bytes as people read them.

    >>> size(3 * 2**20), size(16.06e9)
    ('3.0 MiB', '14.96 GiB')
    """
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
