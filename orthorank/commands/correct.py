"""``orthorank correct``: maps for a plan, which put back part of what its layers leave out."""

import math
from pathlib import Path
from typing import Annotated

import typer

from orthorank.commands import PLAN_OR_DEFAULT, BosChoice, Criteria, Device, DeviceMap, Dtype, Model, register
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, call, console, table_of
from orthorank.common.errors import OrthoRankError, check_choice, check_integer
from orthorank.common.files import check_free, user_path, writable_folder
from orthorank.common.texts import Bos, Text, check_bos, find_text, join_texts, remark_on

OUTPUT = Path("orthorank-correct")
TEXT = "UTF-8 text file to fit on; give one of every kind you will process. Default: the documentation of Python."
DATASET = "Fit on wikitext2 or c4, by the package datasets; wikitext2:FOLDER reads a local copy. May be repeated."
RANK = "Rank of the maps. Higher restores more and costs more: 4 * rank * hidden size FLOPs for each token and layer."
TARGET = "What a map aims at. dense: the dense model's state after the layer; layer: what the layer would have added."
WINDOWS = "Windows to fit on, from the first halves of the texts; as many of their second halves to measure on."
SHARES = "How the texts share the windows, such as 2,1: in the order of --text, then --dataset. Default: equally."
DISTILL = "Steps to train the fitted maps toward the dense model's next tokens, each about 3 forwards of 2 windows."
SPILL = "Folder to keep the windows' hidden states in, until the end of the fit. Default: in memory."
RESUME = "Go on with the fit whose state is in the output folder; begin one if there is none. A finished one stays."
STATE = "correct-state.safetensors"
DISTILLING = "distill-state.safetensors"


def command(
    plan: Annotated[str, typer.Argument(help=PLAN_OR_DEFAULT, show_default=False)],
    model: Model = None,
    text: Annotated[list[Path] | None, typer.Option(help=TEXT)] = None,
    dataset: Annotated[list[str] | None, typer.Option(help=DATASET)] = None,
    rank: Annotated[int, typer.Option(help=RANK)] = 64,
    target: Annotated[str, typer.Option(help=TARGET)] = "dense",
    distill: Annotated[int, typer.Option(help=DISTILL)] = 0,
    windows: Annotated[int, typer.Option(help=WINDOWS)] = 16,
    shares: Annotated[str | None, typer.Option(help=SHARES)] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    criterion: Criteria = None,
    bos: BosChoice = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the plan and its maps.")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    spill: Annotated[Path | None, typer.Option(help=SPILL)] = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows in one forward. Default: by the free memory.")] = None,
) -> int:
    """Fit a small linear map to each layer of a plan, which puts back part of what the layer leaves out.

    The maps are fitted in closed form, in one pass over windows of the first half of each text. Every fourth window is
    held out to measure what the maps explain; the loss is measured on windows of the second halves. With --distill the
    maps are then trained on the same windows; the model's weights stay as they are. Writes orthorank.json and
    correction.safetensors.

    The maps are kept in the output folder, layer by layer: after an interruption, the same command with --resume goes
    on where it stopped.
    """
    from orthorank.config import OrthoRankConfig

    check_bos(bos)
    register(criterion)
    check_choice("target", target, ("dense", "layer"))
    check_integer("rank", rank, 1)
    check_integer("distill", distill, 0)
    followed = None if plan == "default" else OrthoRankConfig.from_pretrained(plan)
    if distill and followed is not None:
        from orthorank.calibration.distilling import check_distillable

        check_distillable(followed)  # before the fit, which takes long
    sources = _sources(text or [], dataset or [])
    counts = windows_of(windows, shares, len(sources))
    states = [user_path("output", output) / name for name in (STATE, DISTILLING)]
    unfinished = [file.name for file in states if file.exists()]
    if unfinished and not resume:
        raise OrthoRankError(
            f"output folder {str(output)!r} has an unfinished fit ({', '.join(unfinished)}); go on with it by adding "
            "--resume, delete it, or name another folder with --output"
        )
    done = None
    if not unfinished:  # else the state says whether it is the same fit, before anything is written
        if resume and all((states[0].parent / name).exists() for name in ("orthorank.json", "correction.safetensors")):
            done = OrthoRankConfig.from_pretrained(states[0].parent)
        else:
            check_free(output)
    folder = writable_folder(output)
    screen = RichScreen(console())

    import torch

    from orthorank.calibration.distilling import distill_correction
    from orthorank.calibration.halves import corrected_losses, fit_maps, halves_of, is_of
    from orthorank.plans import default_plan

    loaded, tokenizer, info = load(screen, model, device, dtype, device_map=device_map)
    where = Bos.of(bos, tokenizer)
    samples = [
        halves_of(source, tokenizer, loaded, where, windows=count, window=window, longest=info.max_tokens)
        for source, count in zip(sources, counts, strict=True)
    ]
    followed = default_plan(loaded) if followed is None else followed
    screen.heading(f"{info.name}: maps of rank {rank} on {windows} windows of {window} tokens")
    screen.say(f"{'; '.join(source.name for source in sources)}; {where}")
    if (remark := remark_on(*sources)) is not None:
        screen.say(remark)
    if len(sources) == 1:
        screen.say("One kind of text: maps fit the text they learn from. Give one of every kind that is to come.")
    size = windows * window * loaded.config.get_text_config().hidden_size * loaded.dtype.itemsize
    place = "in memory" if spill is None else f"in {spill}"
    screen.say(f"States kept {place}: {(2 if target == 'dense' else 1) * size / 2**20:,.0f} MiB")
    ids = torch.cat([each.calibration for each in samples])
    if done is not None:
        if not is_of(done, loaded, ids, followed, distill, rank=rank, target=target):
            check_free(output)
        screen.say(f"This fit is finished: {folder / 'orthorank.json'}, maps beside it.")
        return 0
    how = {"rank": rank, "target": target, "batch_size": batch_size, "save_to": states[0], "spill": spill}
    found = fit_maps(screen, "maps", loaded, ids, followed, **how)
    if distill:
        with screen.progress("distilling", distill) as advance:
            found = distill_correction(
                loaded,
                ids,
                found,
                steps=distill,
                save_to=states[1],
                on_step=lambda done, _, loss: advance(done, f"KL {loss:.3f}"),
            )
    found.calibration["correction"] |= {
        "texts": [
            {"text": each.name, "text_sha256": each.sha256, "windows": count}
            for each, count in zip(sources, counts, strict=True)
        ],
        "bos": where.policy,
    }
    losses = corrected_losses(screen, loaded, followed, found, [each.held_out for each in samples])
    found.measured = {"held_out": [{"text": each.name} | loss for each, loss in zip(sources, losses, strict=True)]}
    path = found.save_pretrained(folder)
    for state in states:
        state.unlink(missing_ok=True)
    drawn = table_of("layer", "keep ratio", "explained", left=0)
    for layer, share in found.calibration["correction"]["explained"].items():
        drawn.add_row(layer, f"{found.ratio(int(layer)):.4f}", f"{share:.1%}")
    screen.table(drawn)
    screen.say("explained: the share of what a layer leaves out that its map puts back, on held-out windows.")
    if distill:
        first, last = found.calibration["correction"]["distilled"]["kl"]
        screen.say(
            f"Then distilled for {distill} steps; the table is of the maps before that. KL from the dense model: "
            f"{first:.3f} nats a token in the first steps, {last:.3f} in the last."
        )
    drawn = table_of("loss on the second half of", *losses[0], "won back")
    for each, loss in zip(sources, losses, strict=True):
        drawn.add_row(each.name, *(f"{figure:.4f}" for figure in (*loss.values(), loss["plan"] - loss["corrected"])))
    screen.table(drawn)
    screen.say(f"Plan: {path}, maps beside it; use it with {call('eval ppl', model, '--plan', output)}")
    return 0


def _sources(texts: list[Path], datasets: list[str]) -> list[Text]:
    """Each text that was named; the standard library's prose where none was."""
    from orthorank.common.datasets import dataset_texts

    found = [find_text(path) for path in texts]
    for name in datasets:
        first, rest = dataset_texts(name)
        found.append(first if rest is None else join_texts([first, rest]))
    return found or [find_text()]


def windows_of(windows: int, shares: str | None, texts: int) -> list[int]:
    """How many of ``windows`` each of the texts gives: in proportion to ``shares``, one at least.

    >>> windows_of(16, "2,1", 2), windows_of(16, None, 3)
    ([11, 5], [6, 5, 5])
    """
    if windows < max(2, texts):
        raise OrthoRankError(f"--windows is {windows}, for {texts} texts; it must be one for each text, and 2 in all")
    given = [1.0] * texts if shares is None else [_share(shares, part) for part in shares.split(",")]
    if len(given) != texts:
        raise OrthoRankError(
            f"--shares is {shares!r}, {len(given)} numbers for {texts} texts; give one for each --text, then one for "
            "each --dataset"
        )
    exact, counts = [windows * share / sum(given) for share in given], [1] * texts
    for _ in range(windows - texts):
        counts[max(range(texts), key=lambda i: exact[i] - counts[i])] += 1
    return counts


def _share(shares: str, part: str) -> float:
    try:
        share = float(part)
    except ValueError:
        share = math.nan
    if not (share > 0 and math.isfinite(share)):
        raise OrthoRankError(f"--shares is {shares!r}; it must be numbers above 0 with commas between, such as 2,1")
    return share
