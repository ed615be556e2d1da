"""``orthorank eval ppl``: perplexity of a text, dense and with plans."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from orthorank.commands import BosChoice, Criteria, Device, Dtype, Model, register
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, console, print_json, table_of
from orthorank.common import format as words
from orthorank.common.files import writable_folder, write_json
from orthorank.common.paired import rise_of
from orthorank.common.progress import say_replaced
from orthorank.common.texts import Bos, check_bos

PLAN = (
    "Plan: a file, a folder, or org/name@revision on the Hub; may be given several times. The dense model is measured "
    "as well."
)
TEXT = "UTF-8 text file, read as it is. Default: the documentation of Python inside its standard library."
OUTPUT = "Folder for the results; the same command goes on where it was stopped. Default: nothing is kept."
DATASET = "wikitext2 (test split) or c4 (validation), with :FOLDER for a local copy."


def command(
    model: Model = None,
    plan: Annotated[list[str] | None, typer.Option(help=PLAN)] = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    dataset: Annotated[str | None, typer.Option(help=DATASET)] = None,
    criterion: Criteria = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="First N windows of the text only. Default: all.")] = None,
    bos: BosChoice = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Windows at a time. Default: as memory allows.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    output: Annotated[Path | None, typer.Option(help=OUTPUT)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Perplexity of the dense model and of plans, by the protocol of the pruning literature.

    The text is tokenised in one call and cut into windows without overlap, the tail is dropped, and the perplexity is
    exp(mean over windows of the mean cross entropy). A plan's loss is compared with the dense model's window by window.
    """
    from orthorank.common.datasets import evaluation_text
    from orthorank.evaluation.kept import KeptRows
    from orthorank.evaluation.perplexity import check_window
    from orthorank.evaluation.windows import measure, settings_of
    from orthorank.hf.apply import apply
    from orthorank.speed.bench import read_plans

    check_window(window)
    check_bos(bos)
    register(criterion)
    plans = read_plans(plan)
    folder = None if output is None else writable_folder(output)
    chosen = evaluation_text(text, dataset)
    screen = RichScreen(console(stderr=json))
    say_replaced(screen, folder, "ppl.json")
    kept = KeptRows(None if folder is None else folder / "ppl-rows.jsonl")
    loaded, tokenizer, info = load(screen, model, device, dtype, plans, plan)
    where = Bos.of(bos, tokenizer)
    settings = settings_of(loaded, tokenizer, chosen, dataset, window, windows, batch_size, where)
    rows: list[dict[str, Any]] = []
    results = {"model": info.to_dict(), "text": chosen.name, "window": window, "rows": rows}
    for name, each in ({"dense": None} | plans).items():

        def measured(name: str = name, each: Any = each) -> dict[str, Any]:
            with nullcontext() if each is None else apply(loaded, each):
                return measure(screen, name, loaded, tokenizer, chosen, settings)

        found = kept.of_model(loaded, each, {"text": chosen.sha256} | settings, measured)
        rows.append({"name": name, "plan": None if each is None else each.to_dict()} | found)
        if each is not None:
            rows[-1]["rise"] = rise_of(rows[0]["window_losses"], found["window_losses"])
    if folder is not None:
        write_json(folder / "ppl.json", results)
    if json:
        print_json(results)
    else:
        _show(screen, results, str(where), folder)
    return 0


def _show(screen: Any, results: dict[str, Any], bos: str, folder: Path | None) -> None:
    first = results["rows"][0]
    screen.heading(f"{results['model']['name']}: {results['model']['dtype']} on {results['model']['device']}")
    screen.say(f"{results['text']}; sha256 {first['text_sha256'][:16]}")
    screen.say(
        f"{first['windows']} windows of {first['window']} tokens ({first['tokens']:,} tokens, "
        f"{first['predictions']:,} predicted); {bos}"
    )
    drawn = table_of("", "perplexity", "loss", "standard error", "rise of the loss")
    for row in results["rows"]:
        spread = row["standard_error"]
        drawn.add_row(
            row["name"],
            f"{row['perplexity']:.4g}" if row["perplexity"] >= 1000 else f"{row['perplexity']:.2f}",
            f"{row['loss']:.4f}",
            "-" if spread is None else f"{spread:.4f}",
            words.spread(row["rise"]) if "rise" in row else "",
        )
    screen.table(drawn)
    if len(results["rows"]) > 1:
        screen.say("Rise: the loss less the dense model's, paired window by window, with its standard error.")
    if folder is not None:
        screen.say(f"Results: {folder / 'ppl.json'}")
