"""Text from WikiText-2 or C4, by the library ``datasets``, as the papers take it to calibrate and to measure.

To calibrate: WikiText-2 is SLEB's recipe: the training rows, ``shuffle(seed=0)``, the first 128 joined by a blank
line. C4: the first 128 documents of the first shard of its training split, joined by a space. The 128 that follow are
held out.
To measure, as the pruning literature does: WikiText-2's test rows, and the first 1,100 documents of C4's validation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError, reason_of
from orthorank.common.files import user_path
from orthorank.common.loading import silent
from orthorank.common.texts import Text, find_text
from orthorank_kernels.remedies import install

ROWS = 128  # SLEB's number; the rows of WikiText-2 are lines, so this fills four or five windows of 2,048 tokens


@dataclass(frozen=True)
class Recipe:
    """How a text is made of a dataset.

    Args:
        path, arguments: for `datasets.load_dataset`. split: of the dataset.
        joiner: what stands between two rows. words: the recipe in words, as plans record it.
        rows: how many make a text; None: all. shuffled: with seed 0.
        windows: of 2,048 tokens, where the user does not say how many; None: all that the text fills.
    """

    path: str
    arguments: dict[str, Any]
    split: str
    joiner: str
    words: str
    rows: int | None = ROWS
    shuffled: bool = False
    windows: int | None = None


_WIKITEXT2: dict[str, Any] = {
    "path": "Salesforce/wikitext",
    "arguments": {"name": "wikitext-2-raw-v1"},
    "joiner": "\n\n",
}
_C4: dict[str, Any] = {"path": "allenai/c4", "joiner": " "}

RECIPES = {
    "wikitext2": Recipe(
        **_WIKITEXT2,
        split="train",
        shuffled=True,
        words="WikiText-2 (raw) train, shuffle(seed=0), rows {begin} to {end} joined by a blank line",
    ),
    "c4": Recipe(
        **_C4,
        arguments={"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "streaming": True},
        split="train",
        windows=4,
        words="C4 (en) train, shard 0, documents {begin} to {end} joined by a space",
    ),
}
# SLEB's evaluation. WikiText-2: all rows of the test split, an empty row for each blank line of the file.
EVALUATION = {
    "wikitext2": Recipe(
        **_WIKITEXT2,
        split="test",
        rows=None,
        words="WikiText-2 (raw) test, {rows} rows joined by a blank line",
    ),
    "c4": Recipe(
        **_C4,
        arguments={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "streaming": True},
        split="validation",
        rows=1100,
        windows=256,
        words="C4 (en) validation, shard 0, first {rows} documents joined by a space",
    ),
}


def split_name(dataset: str) -> tuple[str, Path | None]:
    """The dataset's name and the folder of a local copy, from ``"wikitext2"`` or ``"wikitext2:FOLDER"``.

    Raises:
        OrthoRankError: an unknown name, no such folder, or the library ``datasets`` is missing.

    >>> split_name("imdb")
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: dataset is 'imdb'; it may be wikitext2 or c4, with :FOLDER for a copy that \
is already here; any other text can be given as a file with --text
    """
    name, _, folder = dataset.partition(":")
    if name not in RECIPES:
        raise OrthoRankError(
            f"dataset is {dataset!r}; it may be {' or '.join(RECIPES)}, with :FOLDER for a copy that is already here; "
            "any other text can be given as a file with --text"
        )
    path = user_path("dataset", folder) if folder else None
    if path is not None and not path.is_dir():
        raise OrthoRankError(f"dataset is {dataset!r}, and there is no folder {folder!r}")
    if find_spec("datasets") is None:
        raise OrthoRankError(
            f"dataset is {dataset!r}, which needs the library datasets; run: {install('eval')}, or name a "
            "text file with --text"
        )
    return name, path


def dataset_texts(dataset: str) -> tuple[Text, Text | None]:
    """The calibration text of a dataset and, from rows that are not in it, a held-out text.

    Args:
        dataset: ``"wikitext2"`` or ``"c4"`` (fetched from the Hugging Face hub, or from its cache), or with
            ``:FOLDER`` a local copy: what ``save_to_disk`` wrote, or a folder of text, JSON or parquet files.

    Returns:
        Both texts; the second is None where the dataset has no more rows.

    Raises:
        OrthoRankError: the dataset cannot be loaded, or it has no column ``text``.
    """
    name, folder = split_name(dataset)
    recipe = RECIPES[name]
    rows = rows_of(dataset, recipe, folder, 2 * ROWS)
    texts = [_joined(recipe, rows[i : i + ROWS], i, folder) for i in (0, ROWS)]
    if texts[0] is None:
        raise OrthoRankError(f"dataset {dataset!r} has no text in its first {ROWS} rows")
    return texts[0], texts[1]


def evaluation_text(text: str | Path | None = None, dataset: str | None = None) -> Text:
    """The text file ``text``, ``dataset`` joined to one text, or with neither the standard library's own prose.

    Args:
        dataset: ``"wikitext2"`` or ``"c4"`` (from the Hugging Face hub or its cache), or with ``:FOLDER`` a local copy.

    Raises:
        OrthoRankError: both are given, or the text cannot be read or loaded.

    >>> evaluation_text("notes.txt", "c4")
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: both text and dataset are given; give one of them
    """
    if dataset is None:
        return find_text(text)
    if text is not None:
        raise OrthoRankError("both text and dataset are given; give one of them")
    name, folder = split_name(dataset)
    recipe = EVALUATION[name]
    rows = rows_of(dataset, recipe, folder, recipe.rows)
    content = recipe.joiner.join(rows)
    if not content.strip():
        raise OrthoRankError(f"dataset {dataset!r} has no text")
    if folder is not None:  # what its rows are of is its owner's knowledge
        return Text(f"{name} from the local copy {folder}, first {len(rows):,} rows", content)
    return Text(recipe.words.format(rows=f"{len(rows):,}"), content)


def most_windows(dataset: str | None) -> int | None:
    """How many windows of 2,048 tokens are measured of a dataset at most: 256 of C4; None: all there are.

    >>> most_windows("c4"), most_windows("wikitext2:copy"), most_windows(None)
    (256, None, None)
    """
    return None if dataset is None else EVALUATION[dataset.partition(":")[0]].windows


def rows_of(dataset: str, recipe: Recipe, folder: Path | None, most: int | None = None) -> list[str]:
    """The first ``most`` rows' texts (None: all) of ``dataset``, whose local copy is in ``folder``, by its recipe.

    Raises:
        OrthoRankError: the dataset cannot be loaded, has not the recipe's split, or has no column ``text``.
    """
    try:
        with _quiet():
            loaded = _load(dataset, recipe, folder)
            if recipe.shuffled:
                loaded = loaded.shuffle(seed=0)
            return [row["text"] for row in islice(loaded, most)]
    except OrthoRankError:
        raise
    except KeyError as error:
        raise OrthoRankError(
            f"dataset {dataset!r} has no {error}; its split {recipe.split} needs a column text"
        ) from error
    except Exception as error:  # the library's own errors, those of the hub, of arrow and of the file formats
        remedy = (
            "check the folder"
            if folder
            else f"where the hub cannot be reached, name a local copy ({dataset}:FOLDER) or a text file (--text)"
        )
        raise OrthoRankError(f"dataset {dataset!r} cannot be loaded: {reason_of(error)}; {remedy}") from error


def _load(dataset: str, recipe: Recipe, folder: Path | None) -> Any:
    import datasets

    if folder is None:
        return datasets.load_dataset(recipe.path, split=recipe.split, **recipe.arguments)
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    from_disk = (folder / "dataset_dict.json").is_file()
    splits = datasets.load_from_disk(str(folder)) if from_disk else datasets.load_dataset(str(folder))
    if recipe.split in splits:
        return splits[recipe.split]
    if len(splits) == 1 and not from_disk:  # files whose names tell no split are all called train
        return next(iter(splits.values()))
    raise OrthoRankError(
        f"dataset {dataset!r} has the splits {', '.join(splits)} and {recipe.split} is wanted; name the folder of a "
        "copy that has it"
    )


def _joined(recipe: Recipe, rows: list[str], begin: int, folder: Path | None) -> Text | None:
    content = recipe.joiner.join(rows)
    if not content.strip():
        return None
    words = recipe.words.format(begin=begin, end=begin + len(rows) - 1)
    return Text(f"{words} (from {folder})" if folder else words, content)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and none of the hub's lines about its retries: the outcome is told in one sentence."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with silent("huggingface_hub"):
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
