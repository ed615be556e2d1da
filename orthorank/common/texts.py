"""Text for calibration and measurement: prose that every machine has, or the user's file.

The default is `pydoc_data.topics` of the standard library: the Python language reference, some 110,000 tokens of
English. It differs a little between Python versions, so results record its sha256.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, check_choice, check_integer
from orthorank.common.files import read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "pydoc_data.topics"  # the module whose text is read where none is named
BOS = ("auto", "first", "every", "none")


def check_bos(bos: str) -> None:
    """``bos`` is one of `BOS`."""
    check_choice("bos", bos, BOS)


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether ``tokenizer`` begins a text with its BOS token by itself: its model was trained so."""
    token = getattr(tokenizer, "bos_token_id", None)
    return token is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [token]


@dataclass(frozen=True)
class Bos:
    """Where the tokenizer's BOS token stands: a model that was trained with one has its sink there.

    Args:
        policy: ``"every"``: at the beginning of each window, which holds one token of the text less; ``"first"``: where
            the tokenizer puts it, at the beginning of the text, hence in the first window only; ``"none"``: nowhere.
        token: its id; None: the tokenizer has none. asked: what was asked for, one of `BOS`.
    """

    policy: str
    token: int | None
    asked: str

    @classmethod
    def of(cls, asked: str, tokenizer: "PreTrainedTokenizerBase") -> "Bos":
        """What ``asked`` means with ``tokenizer``: ``"auto"`` is ``"every"`` where it adds one itself, else ``"none"``.

        Raises:
            OrthoRankError: an unknown policy, or every window is to begin with a token that there is not.
        """
        check_bos(asked)
        token = getattr(tokenizer, "bos_token_id", None)
        if asked == "every" and token is None:
            raise OrthoRankError("bos is 'every' and the tokenizer has no BOS token; it may be auto, first or none")
        policy = ("every" if adds_bos(tokenizer) else "none") if asked == "auto" else asked
        return cls(policy, token, asked)

    @property
    def leading(self) -> int | None:
        """The token that every window begins with; None: there is no such."""
        return self.token if self.policy == "every" else None

    def __str__(self) -> str:
        adds = "none" if self.leading is None else "one"
        why = f" (auto: the tokenizer adds {adds} by itself)" if self.asked == "auto" else ""
        every = f"every window begins with BOS, id {self.token}"
        first = "BOS where the tokenizer puts it, in the first window at most"
        return {"every": every, "first": first, "none": "no BOS"}[self.policy] + why


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
        calibration: int64 ``[windows, tokens]``, from the first half of the text.
        held_out: int64 ``[held_out_windows, held_out_len]``, from the second half.
    """

    calibration: "Tensor"
    held_out: "Tensor"


def find_text(path: str | Path | None = None) -> Text:
    """The text in the UTF-8 file ``path``, or the standard library's own prose.

    Raises:
        OrthoRankError: the file cannot be read, is not UTF-8 text or is empty.

    >>> "assert" in find_text().content
    True
    """
    if path is None:
        return _standard_library()
    content = read_text("text", path)
    if not content.strip():
        raise OrthoRankError(f"text {str(path)!r} is empty; name a file with some thousand words")
    return Text(str(path), content)


def remark_on(*texts: Text, options: str = "--text FILE or --dataset NAME") -> str | None:
    """What is to be said where one of ``texts`` is the default one, which is not the user's; None where none is.

    Args:
        options: of the command, by which another text is named.

    >>> remark_on(Text("notes.txt", "..."))
    >>> remark_on(find_text(), options="--text FILE")
    "The text is Python's own documentation, since none was named: what is found on it need not hold for yours. Name \
one like those that are to come with --text FILE."
    """
    if not any(text.name.startswith(DEFAULT) for text in texts):
        return None
    return (
        "The text is Python's own documentation, since none was named: what is found on it need not hold for yours. "
        f"Name one like those that are to come with {options}."
    )


def join_texts(texts: Sequence[Text]) -> Text:
    """One text of several, a blank line between each two.

    >>> join_texts([Text("a", "one"), Text("b", "two")])
    Text(name='a, b', content='one\\n\\ntwo')
    """
    return Text(", ".join(text.name for text in texts), "\n\n".join(text.content for text in texts))


def tokenize(text: Text, tokenizer: "PreTrainedTokenizerBase", bos: Bos | None = None) -> "Tensor":
    """All tokens of ``text`` in one call, int64 ``[tokens]``.

    A BOS, if the tokenizer adds one, comes first, unless ``bos`` says that it is in every window or nowhere.
    """
    import torch

    plain: dict[str, Any] = {} if bos is None or bos.policy == "first" else {"add_special_tokens": False}
    return torch.tensor(tokenizer(text.content, verbose=False, **plain)["input_ids"], dtype=torch.int64)


def read_tokens(
    text: Text, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", bos: Bos | None = None
) -> "Tensor":
    """As `tokenize`; raises where `check_ids` does, for the BOS token, too."""
    import torch

    tokens = tokenize(text, tokenizer, bos)
    check_ids(tokens, model)
    if bos is not None and bos.leading is not None:
        check_ids(torch.tensor([bos.leading]), model)
    return tokens


def beginning_with(token: int | None, windows: "Tensor") -> "Tensor":
    """``windows [count, length]`` with ``token`` before each, ``[count, length + 1]``; None: as they are.

    >>> import torch
    >>> beginning_with(7, torch.tensor([[1, 2], [3, 4]])).tolist()
    [[7, 1, 2], [7, 3, 4]]
    """
    import torch

    if token is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], token), windows], dim=1)


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
    window: int,
    held_out_windows: int,
    held_out_len: int,
    name: str = "the text",
    leading: int | None = None,
) -> Samples:
    """Cut calibration windows from the first half of ``tokens`` and held-out windows from the second.

    The windows of a half are spread evenly over it, so that a few of them see more than one subject.

    Args:
        tokens: int64 ``[tokens]``.
        windows, window: number and length of the calibration windows, 1 or more windows of 2 or more tokens.
        held_out_windows, held_out_len: the same for the held-out windows; fewer are taken where the text is short,
            but never less than one.
        name: what the error calls the text.
        leading: a token that every window begins with, as `Bos.leading`; its length counts it.

    Raises:
        OrthoRankError: the text is too short, with the number of tokens it has and needs; a number is out of range.

    >>> import torch
    >>> samples = take_samples(torch.arange(12), windows=1, window=4, held_out_windows=2, held_out_len=3)
    >>> samples.calibration.tolist(), samples.held_out.tolist()
    ([[0, 1, 2, 3]], [[6, 7, 8], [9, 10, 11]])
    """
    check_integer("windows", windows, 1)
    check_integer("window", window, 2)
    check_integer("held_out_windows", held_out_windows, 1)
    check_integer("held_out_len", held_out_len, 2)
    half, room = len(tokens) // 2, 0 if leading is None else 1
    needed = 2 * max(windows * (window - room), held_out_len - room)
    if half < needed // 2:
        raise OrthoRankError(
            f"{name} is too short: it has {len(tokens):,} tokens and {needed:,} are needed "
            f"({windows} windows of {window} in its first half, and at least one of {held_out_len} in its second); "
            "name a longer one with --text, or lower --windows or --window"
        )
    return Samples(
        calibration=spread(tokens[:half], windows, window, leading),
        held_out=spread(
            tokens[half:], min(held_out_windows, (len(tokens) - half) // (held_out_len - room)), held_out_len, leading
        ),
    )


def ids_sha256(ids: "Tensor") -> str:
    """A hash of token ids, as little-endian int64, whatever their shape."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def spread(tokens: "Tensor", windows: int, length: int, leading: int | None = None) -> "Tensor":
    """Windows without overlap at even distances, ``[windows, length]``; ``leading`` as in `take_samples`."""
    import torch

    distance, body = len(tokens) // windows, length - (leading is not None)
    return beginning_with(leading, torch.stack([tokens[i * distance : i * distance + body] for i in range(windows)]))


def _standard_library() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without it
        raise OrthoRankError(
            "this Python has no pydoc_data, the text used by default; name a text file with --text"
        ) from None
    version = ".".join(map(str, sys.version_info[:3]))
    return Text(f"{DEFAULT} of Python {version}", "\n\n".join(topics[name] for name in sorted(topics)))
