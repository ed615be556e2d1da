"""The windows of a text or dataset, measured with a bar; settings that say what a kept measurement is of."""

from typing import TYPE_CHECKING, Any

from orthorank.common.datasets import most_windows
from orthorank.common.progress import Screen
from orthorank.common.texts import Bos, Text, ids_sha256, read_tokens
from orthorank.evaluation.perplexity import auto_batch_size, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def settings_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: Text,
    dataset: str | None,
    window: int,
    windows: int | None,
    batch_size: int | None,
    where: Bos,
) -> dict[str, Any]:
    """What `perplexity` is called with, beside model, tokenizer and ``text``, and the hash of the text's tokens, which
    is kept with what is measured.
    """
    ids = read_tokens(text, tokenizer, model, where)
    if windows is None and (most := most_windows(dataset)) is not None:
        windows = max(1, min(most * 2048, len(ids)) // window)
    size = auto_batch_size(model, window) if batch_size is None else batch_size
    return {"window": window, "windows": windows, "batch_size": size, "bos": where.asked, "ids_sha256": ids_sha256(ids)}


def measure(
    screen: Screen,
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: Text,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Perplexity of ``model``, with whatever plan is applied to it, with a bar that says whose it is."""
    with screen.progress(f"perplexity of {name}", settings["windows"] or 2) as advance:
        result = perplexity(
            model,
            text=text.content,
            tokenizer=tokenizer,
            on_window=lambda done, total, so_far: advance(done, f"of {total}: {so_far:.2f}"),
            **{name: value for name, value in settings.items() if name != "ids_sha256"},
        )
    return result.to_dict() | {"standard_error": result.standard_error}
