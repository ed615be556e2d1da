"""``orthorank compare``: answers of the dense model and of plans side by side, and how far apart they are."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands import BosChoice, Criteria, Device, Dtype, Model, number, register
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, console, print_json, table_of
from orthorank.common import format as form
from orthorank.common.errors import OrthoRankError, check_integers, check_max_loss
from orthorank.common.files import writable_folder, write_json, write_text
from orthorank.common.paired import is_within, rise_of
from orthorank.common.progress import say_replaced
from orthorank.common.texts import Bos, check_bos
from orthorank.report import words

if TYPE_CHECKING:
    from rich.table import Table

    from orthorank.config import OrthoRankConfig

OUTPUT = Path("orthorank-compare")
PLAN = "Plan: a file, a folder, or org/name@revision on the Hub; may be given several times."
PROMPTS = (
    "UTF-8 file: JSON lines with prompt (a text, or token ids) or messages (for the chat template), or with these in "
    "body, as logs of a server's requests have them; or one prompt a line."
)
SAMPLE = (
    "So many of the prompts, drawn at random, the same ones each time; lines that are none are left out, and drawn "
    "ones that are too long for the model. Default: all."
)
TEXT = "UTF-8 text file to measure losses on, window by window. Default: losses of the dense model's answers."
DATASET = "Instead of a text: wikitext2 (test split) or c4 (validation), with :FOLDER for a local copy."
MAX_LOSS = "Exit code 1 if the mean rise of a plan's loss plus two standard errors is above this, in nats a token."
STATE = "compare-state.jsonl"
SHOWN = 4  # prompts whose answers the terminal shows


def command(
    model: Model = None,
    plan: Annotated[list[str] | None, typer.Option(help=PLAN)] = None,
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS)] = None,
    sample: Annotated[int | None, typer.Option(help=SAMPLE)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    dataset: Annotated[str | None, typer.Option(help=DATASET)] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window of the text.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="First N windows of the text only. Default: all.")] = None,
    max_loss: Annotated[str | None, typer.Option(help=MAX_LOSS)] = None,
    criterion: Criteria = None,
    bos: BosChoice = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Windows at a time. Default: as memory allows.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    output: Annotated[Path, typer.Option(help="Folder for compare.json, compare.html and the state.")] = OUTPUT,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> int:
    """Answers of the dense model and of plans side by side, KL divergences of the next token, and paired losses.

    Decoding is greedy. Each prompt's results are kept in the output folder at once: the same command goes on where it
    was stopped.
    """
    from orthorank.common.datasets import evaluation_text
    from orthorank.evaluation.compare import compare_plans, that_fit
    from orthorank.evaluation.kept import going_on, kept_rows
    from orthorank.evaluation.perplexity import check_window
    from orthorank.evaluation.prompts import sample_prompts
    from orthorank.evaluation.windows import settings_of
    from orthorank.report.page import render
    from orthorank.speed.bench import read_plans

    most = number("--max-loss", max_loss)
    check_max_loss(most)
    check_integers({"max_new_tokens": max_new_tokens}, max_new_tokens=1)
    check_integers({"windows": windows, "batch_size": batch_size, "sample": sample}, windows=1, batch_size=1, sample=1)
    check_window(window)
    check_bos(bos)
    register(criterion)
    if not plan:
        raise OrthoRankError("plan is not given; name what is compared with the dense model by --plan, once or more")
    if prompts is None:
        raise OrthoRankError("prompts is not given; name a file with one prompt a line by --prompts")
    plans, (asked, odd) = read_plans(plan), sample_prompts(prompts, sample)
    chosen = evaluation_text(text, dataset) if text is not None or dataset is not None else None
    if most is not None and (len(asked) if chosen is None else windows) == 1:
        what = "prompt" if chosen is None else "window"
        raise OrthoRankError(f"max_loss is given with one {what}, which has no standard error; give two or more")
    folder = writable_folder(output)
    state = folder / STATE
    kept_rows(state, row=dict)  # complains, if at all, before the model is loaded
    screen = RichScreen(console(stderr=json))
    say_replaced(screen, folder, "compare.json", "compare.html")
    loaded, tokenizer, info = load(screen, model, device, dtype, plans, plan)
    drawn = len(asked)
    if sample is not None:
        asked = that_fit(loaded, tokenizer, asked, max_new_tokens, bos)
        if not asked:
            raise OrthoRankError(f"sample is {sample}, and all prompts drawn are too long for the model; draw more")
    settings = None
    if chosen is not None:
        settings = settings_of(loaded, tokenizer, chosen, dataset, window, windows, batch_size, Bos.of(bos, tokenizer))
    results: dict[str, Any] = {"model": info.to_dict(), "max_new_tokens": max_new_tokens, "bos": bos}
    results |= {"too_long": drawn - len(asked), "no_prompts": odd}
    if sample is not None and drawn < sample:
        screen.say(f"{prompts} has {drawn} prompts, fewer than --sample {sample}: all of them are taken.")
    if odd:
        screen.say(f"Lines of {prompts} that are no prompts: {odd}, left out; without --sample the first one is named.")
    with going_on(f"what is measured is in {state}"):
        with screen.progress("prompts", len(asked)) as advance:
            results |= compare_plans(
                loaded,
                tokenizer,
                plans,
                asked,
                max_new_tokens=max_new_tokens,
                bos=bos,
                kept=state,
                on_prompt=lambda done, total: advance(done, ""),
            )
        results["text"] = None if chosen is None else chosen.name
        if chosen is not None:
            losses = _window_losses(screen, loaded, tokenizer, plans, chosen, settings, state)
            results |= {"window": window, "text_sha256": chosen.sha256, "windows": len(losses["dense"])}
            for name, found in results["plans"].items():
                found |= {"answer_rise": found["rise"], "rise": rise_of(losses["dense"], losses[name])}
    for name, each in plans.items():
        results["plans"][name]["plan"] = each.to_dict()
    verdicts = [] if most is None else [_verdict(name, each["rise"], most) for name, each in results["plans"].items()]
    results |= {"max_loss": most, "verdicts": verdicts}
    write_json(folder / "compare.json", results)
    write_text(folder / "compare.html", render("compare.html.j2", results=results))
    if json:
        print_json(results)
    else:
        _show(screen, results, folder)
    return int(most is not None and not all(is_within(each["rise"], most) for each in results["plans"].values()))


def _window_losses(
    screen: RichScreen,
    model: Any,
    tokenizer: Any,
    plans: "dict[str, OrthoRankConfig]",
    text: Any,
    settings: Any,
    state: Path,
) -> dict[str, list[float]]:
    """Mean loss of each window of the text, dense and with each plan, the windows that are kept already among them."""
    from orthorank.evaluation.kept import KeptRows
    from orthorank.evaluation.windows import measure
    from orthorank.hf.apply import apply

    kept, losses = KeptRows(state), {}
    for name, plan in ({"dense": None} | plans).items():

        def measured(name: str = name, plan: Any = plan) -> dict[str, Any]:
            with nullcontext() if plan is None else apply(model, plan):
                found = measure(screen, name, model, tokenizer, text, settings)
            return {"losses": list(found["window_losses"])}

        losses[name] = kept.of_model(model, plan, {"text": text.sha256} | settings, measured)["losses"]
    return losses


def compared_table(results: dict[str, Any]) -> "Table":
    """How far each plan is from the dense model, as a rich table."""
    heads, rows = words.compared(results)
    drawn = table_of("", *heads)
    for name, cells in rows:
        drawn.add_row(name, *cells)
    return drawn


def _verdict(name: str, rise: dict[str, Any], most: float) -> str:
    falls = rise["mean"] < 0
    size = rise | {"mean": abs(rise["mean"])}
    said = f"its loss {'falls' if falls else 'rises'} by {form.spread(size)} nats a token"
    if is_within(rise, most):
        return f"{name} is within {most:g}: {said}."
    if rise["most"] != rise["most"]:
        return f"{name} is not shown to be within {most:g}: {said}, and the standard error is not known."
    return f"{name} is not within {most:g}: {said}, and with two standard errors that is {rise['most']:.4f}."


def _show(screen: RichScreen, results: dict[str, Any], folder: Path) -> None:
    screen.heading(f"{results['model']['name']}: {results['model']['dtype']} on {results['model']['device']}")
    screen.table(compared_table(results))
    losses = "the dense model's answers" if results["text"] is None else results["text"]
    screen.say(f"Means with standard errors, in nats a token; KL(dense || plan). Losses are of {losses}.")
    if results["too_long"]:
        screen.say(f"Of the prompts drawn, {results['too_long']} left out: too long for the model with an answer.")
    for row in results["prompts"][:SHOWN]:
        answers = {"dense": row["dense"]} | row["plans"]
        drawn = table_of(*answers, left=len(answers))
        drawn.add_row(*(" ".join(each["answer"].split()) or "(empty)" for each in answers.values()))
        screen.heading(" ".join(row["prompt"].split())[:200])
        screen.table(drawn)
    if (left := len(results["prompts"]) - SHOWN) > 0:
        screen.say(f"{left} more in the page.")
    if empty := sum(not row["dense"]["answer"].strip() for row in results["prompts"]):
        screen.say(
            f"Of the dense model's answers {empty} of {len(results['prompts'])} are empty: it ended at once. A model "
            "trained for chat answers prompts in its chat template: write them as JSON lines with messages."
        )
    for sentence in results["verdicts"]:
        screen.say(sentence)
    screen.say(f"Results: {folder / 'compare.json'}; answers side by side: {folder / 'compare.html'}")
