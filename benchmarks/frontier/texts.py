"""What is fitted to, what layers are chosen on, and what is measured: windows that share nothing."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bench_criteria import read_text
from benchmarks.paired import cut
from orthorank import OrthoRankError

FIRST_TO_FIT = 600  # the C4 document from which on is fitted and chosen; those before it are measured on
SHARED = 24  # tokens in a row that two different texts do not have in common, but for quotations


class Windows(NamedTuple):
    """Token ids, int64 ``[windows, tokens]``.

    Args:
        fit: for the maps. judge: for the choice of layers. more: both, and further ones of the same kinds. All of these
            alternate between WikiText-2 and C4. test: by text.
    """

    fit: Tensor
    judge: Tensor
    more: Tensor
    test: dict[str, Tensor]


class Sizes(NamedTuple):
    """Windows and their tokens: of the fit, of the choice of layers, and of each text that is measured."""

    fit: int = 16
    judge: int = 8
    tokens: int = 512
    test: int = 32
    test_tokens: int = 1024


def read_texts(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """WikiText-2's validation text, the texts that are only measured, by name, and the documents of C4.

    Raises:
        OrthoRankError: a file is missing.
    """
    files = {
        "validation": folder / "wikitext2" / "wiki.valid.tokens",
        "WikiText-2": folder / "wikitext2" / "wiki.test.raw",
        "C4": folder / "c4" / "c4_sample.jsonl",
        "speeches": folder / "text" / "inaugural.txt",
    }
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise OrthoRankError(f"{missing[0]} is not there; name a folder that has wikitext2/, c4/ and text/ with --data")
    documents = [json.loads(line)["text"] for line in files["C4"].read_text(encoding="utf-8").splitlines()]
    test = {name: files[name].read_text(encoding="utf-8") for name in ("WikiText-2", "speeches")}
    return read_text(files["validation"])[0], test, documents


def read_windows(tokenizer: Any, folder: Path, sizes: Sizes, more: int = 0) -> Windows:
    """The windows of the frontier.

    Args:
        folder: with ``wikitext2/``, ``c4/`` and ``text/``. more: windows in ``Windows.more``, if they are not fewer
            than those that are fitted to and judged on.

    Raises:
        OrthoRankError: a file is missing or too short, or what is fitted to occurs in what is measured.
    """
    validation, test, documents = read_texts(folder)

    def windows(text: str, count: int, tokens: int, name: str) -> Tensor:
        ids = tokenizer(text[: 12 * count * tokens], add_special_tokens=False, verbose=False)["input_ids"]
        return cut(ids, tokens, count, name)

    calibration = {
        "WikiText-2": validation,
        "C4": " ".join(documents[FIRST_TO_FIT:]),
    }
    test["C4"] = " ".join(documents[:FIRST_TO_FIT])
    count = max(more, sizes.fit + sizes.judge)
    half = -(-count // 2)
    kinds = [windows(text, half, sizes.tokens, f"{name} to fit to") for name, text in calibration.items()]
    mixed = torch.stack(kinds, 1).flatten(0, 1)[:count]
    measured = {name: windows(text, sizes.test, sizes.test_tokens, f"{name} to measure") for name, text in test.items()}
    for name, ids in measured.items():
        check_apart(mixed, ids, name)
    return Windows(mixed[sizes.judge : sizes.judge + sizes.fit], mixed[: sizes.judge], mixed, measured)


def check_apart(calibration: Tensor, test: Tensor, name: str) -> None:
    """No ``SHARED`` tokens in a row are in both.

    Raises:
        OrthoRankError: some are; the message says where.
    """
    runs = {tuple(run) for window in calibration for run in window.unfold(0, SHARED, 1).tolist()}
    for number, window in enumerate(test):
        for at, run in enumerate(window.unfold(0, SHARED, 1).tolist()):
            if tuple(run) in runs:
                raise OrthoRankError(
                    f"window {number} of {name} has {SHARED} tokens from position {at} on that the calibration has, "
                    "too: what is measured must not be what was fitted to"
                )
