"""Perplexity of a text: windows without overlap, ``exp(mean over windows of the mean cross entropy)``.

The protocol of the pruning literature (paper, section 4.1): the text is tokenised in one call, cut into windows, and
the tail that fills no window is dropped. The first token of a window is not predicted. A tokenizer that adds a BOS
token does so at the beginning of the text, hence in the first window only; a model that needs one (Gemma) is then
measured on text that it never sees, and ``bos="every"`` or ``"auto"`` measures it as it is used.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from orthorank.common.errors import OrthoRankError, check_integer
from orthorank.common.paired import mean_of
from orthorank.common.texts import Bos, Text, beginning_with, ids_sha256, tokenize
from orthorank.families.known import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS_AT_ONCE = 512  # whose logits are widened to float32 together

OnWindow = Callable[[int, int, float], None]


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Args:
        perplexity: ``exp(loss)``; inf when it overflows.
        loss: mean of ``window_losses``, in nats per token.
        window_losses: mean cross entropy of each window.
        windows, window: how many, of how many tokens.
        tokens: tokens read, ``windows * window``; one of each window is not predicted.
        predictions: tokens whose loss was averaged.
        bos: ``"first"``, ``"every"`` or ``"none"``; None when token ids were given.
        text_sha256: of the text in UTF-8, None when token ids were given.
        ids_sha256: of the tokens read, as little-endian int64.
    """

    perplexity: float
    loss: float
    window_losses: tuple[float, ...]
    windows: int
    window: int
    tokens: int
    predictions: int
    bos: str | None
    text_sha256: str | None
    ids_sha256: str

    @property
    def standard_error(self) -> float:
        """Of ``loss``, from the spread between windows; NaN for a single one."""
        return mean_of(self.window_losses)[1]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON stores them."""
        return dataclasses.asdict(self)


@torch.no_grad()
def perplexity(
    model: "PreTrainedModel",
    input_ids: Tensor | None = None,
    *,
    text: str | None = None,
    tokenizer: Any = None,
    window: int = 2048,
    windows: int | None = None,
    batch_size: int = 1,
    bos: str = "first",
    on_window: OnWindow | None = None,
) -> PerplexityResult:
    """Perplexity of ``model`` on a text, with whatever plan is applied to it.

    Args:
        model: a causal language model in eval mode, dense or with a plan.
        input_ids: int64 ``[tokens]``, a text to be cut into windows, or ``[windows, tokens]``, windows ready made.
        text, tokenizer: instead of ``input_ids``: a text as it is, and what tokenises it, in one call.
        window: tokens of a window, at least 2. Ready-made windows have their own length.
        windows: how many to measure, from the beginning; None: all that the text fills.
        batch_size: windows in one forward. It changes results by rounding only.
        bos: for ``text``: ``"first"``: as the tokenizer does it (a BOS, if it adds one, begins the text);
            ``"none"``: no special tokens; ``"every"``: a BOS begins every window, which holds ``window - 1`` tokens
            of the text; ``"auto"``: ``"every"`` where the tokenizer adds one by itself, else ``"none"``.
        on_window: called after each batch as ``on_window(done, total, perplexity so far)``.

    Returns:
        The result, with the number of tokens and the hashes that say what was measured.

    Raises:
        OrthoRankError: the text is too short for one window (or for ``windows``), or an argument is out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> result = perplexity(LlamaForCausalLM(config).eval(), torch.arange(60), window=16)
        >>> result.windows, result.tokens, 50 < result.perplexity < 80  # a random model: about the vocabulary, 64
        (3, 48, True)
    """
    if model.training:
        raise OrthoRankError("model is in training mode; call model.eval() first")
    check_integer("batch_size", batch_size, 1)
    cut, sha256, policy = _windows(input_ids, text, tokenizer, window, bos)
    cut = _first(cut, windows)
    _check_length(model, cut.shape[1])
    losses: list[float] = []
    for ids in cut.to(device_of(model)).split(batch_size):
        logits = model(input_ids=ids, use_cache=False).logits
        losses += [_window_loss(logits[row], ids[row]) for row in range(len(ids))]
        if on_window is not None:
            on_window(len(losses), len(cut), _exp(sum(losses) / len(losses)))
    loss = sum(losses) / len(losses)
    return PerplexityResult(
        perplexity=_exp(loss),
        loss=loss,
        window_losses=tuple(losses),
        windows=cut.shape[0],
        window=cut.shape[1],
        tokens=cut.numel(),
        predictions=cut.shape[0] * (cut.shape[1] - 1),
        bos=policy,
        text_sha256=sha256,
        ids_sha256=ids_sha256(cut),
    )


def check_window(window: int) -> None:
    """``window`` holds a token that is predicted."""
    if window < 2:
        raise OrthoRankError(f"window is {window}; it must be at least 2, since the first token is not predicted")


def auto_batch_size(model: "PreTrainedModel", window: int) -> int:
    """Windows that fit into the device's free memory together, 1 to 16, with their logits and a layer's states.

    On a CPU it is 1: more at a time are no faster there.
    """
    device = device_of(model)
    if device.type != "cuda":
        return 1
    config = model.config.get_text_config()
    free, _ = torch.cuda.mem_get_info(device)
    width = config.vocab_size + 16 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 0)
    return max(1, min(16, int(0.8 * free) // (width * window * model.dtype.itemsize)))


def _windows(
    input_ids: Tensor | None, text: str | None, tokenizer: Any, window: int, bos: str
) -> tuple[Tensor, str | None, str | None]:
    """``[windows, tokens]`` tokens, the hash of the text, and the BOS policy."""
    check_window(window)
    if input_ids is None:
        if text is None:
            raise OrthoRankError("neither input_ids nor text is given; give one of them")
        cut, policy = _tokenised_windows(text, tokenizer, window, bos)
        return cut, hashlib.sha256(text.encode()).hexdigest(), policy
    if text is not None:
        raise OrthoRankError("both input_ids and text are given; give one of them")
    if input_ids.dim() not in (1, 2) or input_ids.is_floating_point():
        raise OrthoRankError(
            f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}; it must be integers, [tokens] "
            "or [windows, tokens]"
        )
    if input_ids.dim() == 2:
        if input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
            raise OrthoRankError(f"input_ids has shape {list(input_ids.shape)}; it must be at least [1, 2]")
        return input_ids, None, None
    return _cut(input_ids, window), None, None


def _tokenised_windows(text: str, tokenizer: Any, window: int, bos: str) -> tuple[Tensor, str]:
    if tokenizer is None:
        raise OrthoRankError("text was given without a tokenizer; pass tokenizer=, or token ids as input_ids")
    where = Bos.of(bos, tokenizer)
    ids = tokenize(Text("", text), tokenizer, where)
    return beginning_with(where.leading, _cut(ids, window - (where.leading is not None))), where.policy


def _cut(ids: Tensor, window: int) -> Tensor:
    count = len(ids) // window
    if count < 1:
        raise OrthoRankError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give a longer text or a smaller window"
        )
    return ids[: count * window].view(count, window)


def _first(cut: Tensor, windows: int | None) -> Tensor:
    if windows is None:
        return cut
    check_integer("windows", windows, 1)
    if len(cut) < windows:
        raise OrthoRankError(
            f"the text fills {len(cut)} windows of {cut.shape[1]} tokens and windows is {windows}; give a longer text, "
            "a smaller window or fewer windows"
        )
    return cut[:windows]


def _check_length(model: "PreTrainedModel", window: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise OrthoRankError(f"window is {window} tokens and the model was made for at most {longest}; use fewer")


def _window_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross entropy in nats of ``ids [window]`` but the first, by ``logits [window, vocabulary]``."""
    total = 0.0
    for begin in range(0, len(ids) - 1, _TOKENS_AT_ONCE):
        end = min(begin + _TOKENS_AT_ONCE, len(ids) - 1)
        losses = cross_entropy(logits[begin:end].float(), ids[begin + 1 : end + 1], reduction="none")
        total += losses.double().sum().item()
    return total / (len(ids) - 1)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
