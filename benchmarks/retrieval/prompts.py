"""Texts in which pairs of words are hidden, with questions, and the windows that maps are fitted to."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.frontier.texts import read_texts
from benchmarks.paired import cut

BLOCKS = 6  # of pairs, in each context
# Frequent words, nearly all of them one token.
KEYS = (
    "castle window garden bottle camera engine forest guitar hammer island jacket kitchen mirror needle office pencil "
    "saddle tunnel wallet bridge church market harbor library museum palace prison school station temple theater tower"
)
VALUES = (
    "horse lion bear snake eagle whale wolf fish duck goat cat dog bird tree rose corn rice wheat bread milk wine salt "
    "sugar gold iron steel glass stone wood paper cotton silk moon sun star rain snow wind fire ice"
)


class Context(NamedTuple):
    """Token ids of a text, and of questions about it with their right answers."""

    ids: list[int]
    questions: list[tuple[list[int], list[int]]]


def make_context(tokenizer: Any, paragraphs: list[str], tokens: int, pairs: int, seed: int) -> Context:
    """Pairs of words in ``BLOCKS`` blocks among paragraphs, about so many tokens, and a question for each pair."""
    draw = random.Random(seed)
    keys, values = draw.sample(KEYS.split(), pairs), draw.sample(VALUES.split(), pairs)
    facts = [f'{{"{key}": "{value}"}}' for key, value in zip(keys, values, strict=True)]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    questions = [(ids(f'\n\n{{"{key}": "'), ids(f'{value}"}}')) for key, value in zip(keys, values, strict=True)]
    left = tokens - sum(len(ids(f"{fact}\n")) for fact in facts) - max(len(a) + len(b) for a, b in questions)
    filler: list[str] = []
    at = draw.randrange(len(paragraphs))
    while (used := len(ids(paragraphs[(at + len(filler)) % len(paragraphs)] + "\n\n"))) <= left:
        filler.append(paragraphs[(at + len(filler)) % len(paragraphs)])
        left -= used
    parts: list[str] = []
    for block in range(BLOCKS):  # each in the middle of its share of the text
        first, last = (round(each * len(filler) / BLOCKS) for each in (block, block + 1))
        middle = (first + last) // 2
        own = facts[block * pairs // BLOCKS : (block + 1) * pairs // BLOCKS]
        parts += [*filler[first:middle], "\n".join(own), *filler[middle:last]]
    return Context(ids("\n\n".join(parts)), questions)


def paragraphs_of(text: str) -> list[str]:
    """Those of middle length, none of which is a heading."""
    return [line.strip() for line in text.split("\n") if 150 < len(line.strip()) < 900]


def to_fit(tokenizer: Any, folder: Path, count: int, tokens: int) -> torch.Tensor:
    """The windows of the fit ``[count, tokens]``, half of WikiText-2's validation text and half of C4."""
    validation, _, documents = read_texts(folder)
    texts = {"WikiText-2": validation, "C4": " ".join(documents)}

    def windows(text: str, name: str) -> torch.Tensor:
        ids = tokenizer(text[: 6 * count * tokens], add_special_tokens=False, verbose=False)["input_ids"]
        return cut(ids, tokens, count // 2, f"the fit's {name}")

    return torch.cat([windows(text, name) for name, text in texts.items()])
