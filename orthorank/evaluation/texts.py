"""The texts that perplexity is measured on: a file as it is, or a dataset as the pruning literature takes it."""

from pathlib import Path

from orthorank.common.datasets import Recipe, rows_of, split_name
from orthorank.common.errors import OrthoRankError
from orthorank.common.texts import Text, find_text

# SLEB's evaluation. WikiText-2: all rows of the test split, an empty row for each blank line of the file.
RECIPES = {
    "wikitext2": Recipe(
        path="Salesforce/wikitext",
        arguments={"name": "wikitext-2-raw-v1"},
        shuffled=False,
        joiner="\n\n",
        windows=None,
        words="WikiText-2 (raw) test, {rows} rows joined by a blank line",
        split="test",
    ),
    "c4": Recipe(
        path="allenai/c4",
        arguments={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "streaming": True},
        shuffled=False,
        joiner=" ",
        windows=256,
        words="C4 (en) validation, shard 0, first {rows} documents joined by a space",
        split="validation",
    ),
}
_ROWS = {"wikitext2": None, "c4": 1100}


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
    recipe = RECIPES[name]
    rows = rows_of(dataset, recipe, folder, _ROWS[name])
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
    return None if dataset is None else RECIPES[dataset.partition(":")[0]].windows
