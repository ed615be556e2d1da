"""The windows that a search measures losses on, and those held out from it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.texts import Bos, Text, beginning_with, find_text, ids_sha256, read_tokens, take_samples, tokenize
from orthorank.search import settings as defaults
from orthorank.search.settings import SearchSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """Texts that are there but not yet tokenised.

    Args:
        text: to calibrate on. held_out: another text to measure on; None: the second half of ``text``, or nothing.
        dataset: the dataset's name, or None for a text.
    """

    text: Text
    held_out: Text | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Windows of a search.

    Args:
        windows: int64 ``[windows, tokens]``. held_out: int64 ``[held-out windows, tokens]``; None: there is no
            text left for it.
        text: what the windows are from; text_tokens: how many tokens it has.
        held_out_words: what the held-out windows are from. bos: where the tokenizer's BOS stands.
        fit: int64 ``[fit windows, tokens]``, other windows of the same half, to fit maps to; None: there are no maps.
    """

    windows: "Tensor"
    held_out: "Tensor | None"
    text: Text
    text_tokens: int
    held_out_words: str
    bos: Bos
    fit: "Tensor | None" = None

    def __str__(self) -> str:
        count, length = self.windows.shape
        beside = "" if self.fit is None else f", maps fitted on {len(self.fit)} others"
        return f"{count} windows of {length} tokens{beside}; {self.text.name}"

    def to_dict(self) -> dict[str, Any]:
        """What a plan records of its calibration: the text's hash, the tokens' hash (little-endian int64), sizes."""
        windows, window = self.windows.shape
        return {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "ids_sha256": ids_sha256(self.windows),
            "tokens": windows * window,
            "windows": windows,
            "seq_len": window,
        } | ({} if self.fit is None else {"fit_windows": len(self.fit), "fit_ids_sha256": ids_sha256(self.fit)})


def find_source(settings: SearchSettings) -> Source:
    """The text or dataset that the settings name.

    Raises:
        OrthoRankError: it cannot be read.
    """
    if settings.dataset is None:
        return Source(find_text(settings.text))
    from orthorank.common.datasets import dataset_texts, split_name

    text, held_out = dataset_texts(settings.dataset)
    return Source(text, held_out, split_name(settings.dataset)[0])


def cut_windows(
    settings: SearchSettings,
    source: Source,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    held_out: tuple[int, int] | None = None,
) -> Calibration:
    """Tokenise in one call and cut windows: from a text evenly over its first half, from a dataset one after another.

    Args:
        held_out: of a text, how many windows of how many tokens; None: as many as are calibrated on.

    Raises:
        OrthoRankError: the text is too short, a window is longer than the model's longest input, or the tokenizer is
            another model's.
    """
    wanted = settings.window or min(defaults.DATASET_SEQ_LEN if source.dataset else defaults.SEQ_LEN, max_tokens)
    if wanted > max_tokens:
        raise OrthoRankError(f"window is {wanted}; the model's longest input has {max_tokens} tokens")
    selects_in = settings.selection.get("select_window", 0)
    if selects_in >= wanted:
        raise OrthoRankError(
            f"select_window is {selects_in}, and a calibration window has {wanted} tokens: that would select as topk "
            "does; lower --select-window or raise --window"
        )
    bos = Bos.of(settings.bos, tokenizer)
    tokens = read_tokens(source.text, tokenizer, model, bos)
    if source.dataset:
        return _consecutive(settings, source, tokens, tokenizer, wanted, bos)
    windows = settings.windows or defaults.WINDOWS
    held_out_windows, held_out_len = held_out or (windows, wanted)
    samples = take_samples(
        tokens,
        windows=windows + _fit_windows(settings, windows),
        window=wanted,
        held_out_windows=held_out_windows,
        held_out_len=min(held_out_len, max_tokens),
        name=f"the text ({source.text.name})",
        leading=bos.leading,
    )
    words = f"{source.text.name} (second half)"
    judged, fit = _divided(samples.calibration, windows)
    return Calibration(judged, samples.held_out, source.text, len(tokens), words, bos, fit)


def _fit_windows(settings: SearchSettings, windows: int) -> int:
    """How many windows maps are fitted to beside ``windows`` others."""
    return 0 if settings.correct is None else settings.fit_windows or 2 * windows


def _judged(settings: SearchSettings, windows: int) -> int:
    """How many of all ``windows`` are left to measure losses on."""
    if settings.correct is None:
        return windows
    return windows // 3 if settings.fit_windows is None else windows - settings.fit_windows


def _divided(windows: "Tensor", judged: int) -> "tuple[Tensor, Tensor | None]":
    """``judged`` of the windows, at even distances, and the others, if there are any.

    >>> import torch
    >>> judged, fit = _divided(torch.arange(6)[:, None], 2)
    >>> judged.flatten().tolist(), fit.flatten().tolist()
    ([0, 3], [1, 2, 4, 5])
    """
    total = len(windows)
    if total == judged:
        return windows, None
    chosen = {i * total // judged for i in range(judged)}
    return windows[sorted(chosen)], windows[[i for i in range(total) if i not in chosen]]


def _consecutive(
    settings: SearchSettings,
    source: Source,
    tokens: "Tensor",
    tokenizer: "PreTrainedTokenizerBase",
    window: int,
    bos: Bos,
) -> Calibration:
    """SLEB's windows: one after another from the beginning, the tail dropped."""
    from orthorank.common.datasets import RECIPES

    assert source.dataset is not None
    body = window - (bos.leading is not None)  # tokens of the text in a window
    recipe, available = RECIPES[source.dataset], len(tokens) // body
    count = settings.windows or _judged(settings, min(recipe.windows or available, available))
    total = count + _fit_windows(settings, count)
    if total > available or count < 1:
        wanted = "" if settings.correct is None else f", and {total} are wanted, for maps, too"
        raise OrthoRankError(
            f"the text ({source.text.name}) has {len(tokens):,} tokens, which fill {available} windows of {window}"
            f"{wanted}; lower --windows or --window"
        )
    held_out, words = None, ""
    if source.held_out is not None:
        others = tokenize(source.held_out, tokenizer, bos)
        if (fitting := min(count, len(others) // body)) > 0:
            held_out = beginning_with(bos.leading, others[: fitting * body].view(fitting, body))
            words = source.held_out.name
    windows = beginning_with(bos.leading, tokens[: total * body].view(total, body))
    judged, fit = _divided(windows, count)
    return Calibration(judged, held_out, source.text, len(tokens), words, bos, fit)
