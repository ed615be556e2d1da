"""Text for calibration and measurement: prose that every machine has, or the user's file.

The default is `pydoc_data.topics` of the standard library: the Python language reference, some 110,000 tokens of
English. It differs a little between Python versions, so results record its sha256.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orthorank.errors import OrthoRankError
from orthorank.files import user_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Args:
        name: the file, or the module and Python version. content: the text itself.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the content in UTF-8, in hexadecimal.

        >>> Text("a note", "text").sha256[:16]
        '982d9e3eb996f559'
        """
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Samples:
    """Windows of one text for choosing layers and, from another part of it, for measuring.

    Args:
        calibration: int64 ``[windows, seq_len]``, from the first half of the text.
        held_out: int64 ``[held_out_windows, held_out_len]``, from the second half.
        text_tokens: how many tokens the whole text has.
    """

    calibration: "Tensor"
    held_out: "Tensor"
    text_tokens: int


def find_text(path: str | Path | None = None) -> Text:
    """The text in the UTF-8 file ``path``, or the standard library's own prose.

    Raises:
        OrthoRankError: the file cannot be read, is not UTF-8 text or is empty.

    >>> "assert" in find_text().content
    True
    """
    if path is None:
        return _standard_library()
    file = user_path("text", path)
    try:
        content = file.read_bytes().decode("utf-8")  # as it is: reading as text would rewrite the ends of its lines
    except OSError as error:
        raise OrthoRankError(f"text {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OrthoRankError(f"text {str(path)!r} is not a UTF-8 text file (byte {error.start})") from error
    if not content.strip():
        raise OrthoRankError(f"text {str(path)!r} is empty; name a file with some thousand words")
    return Text(str(path), content)


def join_texts(texts: Sequence[Text]) -> Text:
    """One text of several, a blank line between each two.

    >>> join_texts([Text("a", "one"), Text("b", "two")])
    Text(name='a, b', content='one\\n\\ntwo')
    """
    return Text(", ".join(text.name for text in texts), "\n\n".join(text.content for text in texts))


def tokenize(text: Text, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """All tokens of ``text`` in one call, int64 ``[tokens]``; a BOS, if the tokenizer adds one, comes first."""
    import torch

    return torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.int64)


def check_ids(ids: "Tensor", model: "PreTrainedModel", name: str = "the tokenizer") -> None:
    """Every one of ``ids`` has an embedding in ``model``; ``name`` is what the error calls their source.

    Raises:
        OrthoRankError: an id is outside the model's vocabulary, as when a folder holds another model's tokenizer.
    """
    entries = model.get_input_embeddings().weight.shape[0]
    wrong = ids[(ids < 0) | (ids >= entries)]
    if wrong.numel():
        raise OrthoRankError(
            f"{name} gives the id {int(wrong[0])}, and the vocabulary of the model has {entries:,} entries, 0 to "
            f"{entries - 1}: they do not belong together; name a model with its own tokenizer"
        )


def take_samples(
    tokens: "Tensor",
    *,
    windows: int,
    seq_len: int,
    held_out_windows: int,
    held_out_len: int,
    name: str = "the text",
) -> Samples:
    """Cut calibration windows from the first half of ``tokens`` and held-out windows from the second.

    The windows of a half are spread evenly over it, so that a few of them see more than one subject.

    Args:
        tokens: int64 ``[tokens]``.
        windows, seq_len: number and length of the calibration windows, 1 or more windows of 2 or more tokens.
        held_out_windows, held_out_len: the same for the held-out windows; fewer are taken where the text is short,
            but never less than one.
        name: what the error calls the text.

    Raises:
        OrthoRankError: the text is too short, with the number of tokens it has and needs; a number is out of range.

    >>> import torch
    >>> samples = take_samples(torch.arange(12), windows=1, seq_len=4, held_out_windows=2, held_out_len=3)
    >>> samples.calibration.tolist(), samples.held_out.tolist()
    ([[0, 1, 2, 3]], [[6, 7, 8], [9, 10, 11]])
    """
    for key, value, least in (
        ("windows", windows, 1),
        ("seq_len", seq_len, 2),
        ("held_out_windows", held_out_windows, 1),
        ("held_out_len", held_out_len, 2),
    ):
        if value < least:
            raise OrthoRankError(f"{key} is {value}; it must be {least} or more")
    half = len(tokens) // 2
    needed = 2 * max(windows * seq_len, held_out_len)
    if half < needed // 2:
        raise OrthoRankError(
            f"{name} is too short: it has {len(tokens):,} tokens and {needed:,} are needed "
            f"({windows} windows of {seq_len} in its first half, and at least one of {held_out_len} in its second); "
            "name a longer one with --text, or lower --windows or --seq-len"
        )
    return Samples(
        calibration=_spread(tokens[:half], windows, seq_len),
        held_out=_spread(tokens[half:], min(held_out_windows, (len(tokens) - half) // held_out_len), held_out_len),
        text_tokens=len(tokens),
    )


def _spread(tokens: "Tensor", windows: int, length: int) -> "Tensor":
    """``windows`` non-overlapping windows at even distances, ``[windows, length]``."""
    import torch

    distance = len(tokens) // windows
    return torch.stack([tokens[i * distance : i * distance + length] for i in range(windows)])


def _standard_library() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without it
        raise OrthoRankError(
            "this Python has no pydoc_data, the text used by default; name a text file with --text"
        ) from None
    version = ".".join(map(str, sys.version_info[:3]))
    return Text(f"pydoc_data.topics of Python {version}", "\n\n".join(topics[name] for name in sorted(topics)))
