"""``orthorank calibrate``: thresholds for a plan, so that tokens are selected one by one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands import PLAN_OR_DEFAULT, BosChoice, Criteria, Device, Dtype, Model, number, register
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, call, console, table_of
from orthorank.common.files import check_free, writable_folder
from orthorank.common.texts import Bos, check_bos, find_text, join_texts

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

OUTPUT = Path("orthorank-calibrate")
TEXT = "UTF-8 text file to calibrate on; may be given several times. Default: the documentation of Python."
KEEP_RATIO = "Share of tokens to update, in layers without a ratio of their own in the plan. Default: the plan's."
DECODE = "dense, or threshold: select generated tokens, too. Default: the plan's."
KEEP_LAST = "Last tokens of a prompt that generate() always updates; 0 for none. Default: the plan's."
WINDOWS = "Windows of the first half to calibrate on, and as many of the second half to check on."


def command(
    model: Model = None,
    plan: Annotated[str, typer.Option(help=PLAN_OR_DEFAULT)] = "default",
    criterion: Criteria = None,
    text: Annotated[list[Path] | None, typer.Option(help=TEXT)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    decode: Annotated[str | None, typer.Option(help=DECODE)] = None,
    keep_last: Annotated[int | None, typer.Option(help=KEEP_LAST)] = None,
    windows: Annotated[int, typer.Option(help=WINDOWS)] = 8,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    bos: BosChoice = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the plan (orthorank.json).")] = OUTPUT,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in one forward. Default: by the free memory.")] = None,
) -> int:
    """Find a threshold for each layer of a plan and write the plan to orthorank.json.

    A layer then updates every token that scores below its threshold, instead of the best k of a prompt: whether a token
    is updated no longer depends on other tokens. The thresholds are found on windows of the text's first half; windows
    of its second half show which share of tokens they select there.
    """
    from orthorank.config import OrthoRankConfig

    check_bos(bos)
    register(criterion)
    given = {"keep_ratio": number("keep_ratio", keep_ratio), "decode": decode, "keep_last": keep_last}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    OrthoRankConfig(layers=[], select="threshold", **changes)  # complains, if anything does, before the model loads
    followed = None if plan == "default" else OrthoRankConfig.from_pretrained(plan)
    source = join_texts([find_text(path) for path in text]) if text else find_text()
    check_free(output)
    folder = writable_folder(output)
    screen = RichScreen(console())

    from orthorank.calibration.halves import halves_of, selected_shares
    from orthorank.calibration.thresholds import calibrate
    from orthorank.plans import default_plan

    loaded, tokenizer, info = load(screen, model, device, dtype)
    where = Bos.of(bos, tokenizer)
    samples = halves_of(source, tokenizer, loaded, where, windows=windows, window=window, longest=info.max_tokens)
    followed = default_plan(loaded) if followed is None else followed
    screen.heading(f"{info.name}: thresholds on {windows} windows of {window} tokens")
    screen.say(f"{source.name}; {where}")
    with screen.progress("calibration", followed.selecting[-1] + 1 if followed.selecting else 1) as advance:
        found = calibrate(
            loaded,
            samples.calibration,
            followed,
            **changes,
            batch_size=batch_size,
            on_layer=lambda done, _, tau: advance(done, "" if tau is None else f"threshold {tau:.4g}"),
        )
    found.calibration["thresholds"] |= {"text": source.name, "text_sha256": source.sha256, "bos": where.policy}
    held_out = selected_shares(screen, loaded, found, samples.held_out)
    path = found.save_pretrained(folder)
    drawn = table_of("layer", "keep ratio", "threshold", "calibrated", "second half", left=0)
    for layer in found.selecting:
        shares = found.ratio(layer), found.calibration["thresholds"]["achieved"][str(layer)], held_out[layer]
        wanted, here, there = (f"{share:.4f}" for share in shares)
        drawn.add_row(str(layer), wanted, f"{found.thresholds[layer]:.6g}", here, there)
    screen.table(drawn)
    for sentence in remarks(found):
        screen.say(sentence)
    screen.say(f"Plan: {path}; use it with {call('demo', model, '--plan', output)}")
    return 0


def remarks(plan: "OrthoRankConfig") -> list[str]:
    """What still makes a token's selection depend on how it comes.

    >>> from orthorank.config import OrthoRankConfig
    >>> remarks(OrthoRankConfig([1], select="threshold", thresholds={1: 0.5}, decode="threshold", keep_last=0))
    ['A token is selected alike however its row is cut into calls.']
    """
    found = []
    if plan.decode == "dense":
        found.append("Generated tokens are dense; with --decode threshold they are selected like the prompt's.")
    if plan.keep_last:
        found.append(f"In generate() the last {plan.keep_last} of the prompt are always updated; see --keep-last.")
    return found or ["A token is selected alike however its row is cut into calls."]
