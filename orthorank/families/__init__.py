"""What differs between model families, as data: where a decoder layer's parts are, and what is done with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthorank.common.errors import OrthoRankError

NORMS = ("rms", "layer", "module")
ANGLES = ("halves", "pairs", "once")


def split_heads(attention: Any, projected: Tensor) -> Tensor:
    """``[batch, tokens, heads * head_dim]`` to a ``[batch, heads, tokens, head_dim]`` view."""
    batch, tokens, _ = projected.shape
    return projected.view(batch, tokens, -1, attention.head_dim).transpose(1, 2)


def no_window(attention: Any) -> int | None:
    """Llama: every query sees everything before it."""
    return None


def plain_heads(attention: Any, which: str, projected: Tensor) -> Tensor:
    return split_heads(attention, projected)


def always(module: Any) -> bool:
    return True


def never(module: Any) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps the parts of a decoder layer, and what it does with them.

    Args:
        name: the architecture's name as users know it.
        home: the module of Python that has its classes; empty: not stated, and any classes will do.
        norm: ``"rms"``; ``"layer"`` for LayerNorm; ``"module"`` for anything else, which is called and not computed by
            the kernels. torch_norm: its norms are PyTorch's class, not one of their own; weight_offset: added to the
            norms' weights (Gemma: 1).
        input_norm: attribute name of the norm before attention; None: there is none, and tokens are scored on the
            layer's input itself.
        attention, mlp: their attribute names.
        attn_out_norm, pre_mlp_norm, mlp_out_norm: names of the norms of attention's output, before the MLP and of the
            MLP's output; None: there is none.
        gated: whether the MLP has three projections, or two; FLOPs alone depend on it, since the MLP is called.
        parallel: from the layer to whether its MLP reads what attention reads (a parallel residual).
        qkv: name of one projection for queries, keys and values, in this order; None: there are three.
        heads: from the attention module, ``"q"`` or ``"k"`` and what was projected ``[batch, tokens, width]`` to
            ``[batch, heads, tokens, head_dim]``, normed where the family norms.
        rotates: from the attention module to whether its layer has rotary embeddings; interleaved: pairs of channels
            lie side by side. angles: where the model's cos and sin have the angle of a pair: in both ``"halves"``
            (Llama, GLM), in ``"pairs"`` of columns (Cohere), or ``"once"`` (GPT-OSS). Their width says how many
            channels are rotated.
        window: from the attention module to its sliding window in tokens, or None when it sees everything.
        softcap: the attention module's attribute with the cap of scores; sinks: the one with a logit for each head
            that joins the softmax's denominator; residual_scale: the layer's, with the factor on what is added to the
            residual stream.
        attn_out_dropout, mlp_out_dropout: names of the dropouts of attention's and of the MLP's output, which
            training uses: of a module of the layer, or of a rate (``"self_attn.residual_dropout"``).

    Raises:
        OrthoRankError: norm or angles is none of these.

    >>> Family("Mine", norm="layer").input_norm
    'input_layernorm'
    """

    name: str
    home: str = ""
    norm: str = "rms"
    torch_norm: bool = False
    weight_offset: float = 0.0
    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    attn_out_norm: str | None = None
    pre_mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    gated: bool = True
    mlp_out_norm: str | None = None
    parallel: Callable[[Any], bool] = never
    qkv: str | None = None
    heads: Callable[[Any, str, Tensor], Tensor] = plain_heads
    rotates: Callable[[Any], bool] = always
    interleaved: bool = False
    angles: str = "halves"
    window: Callable[[Any], int | None] = no_window
    softcap: str | None = None
    sinks: str | None = None
    residual_scale: str | None = None
    attn_out_dropout: str | None = None
    mlp_out_dropout: str | None = None

    def __post_init__(self) -> None:
        for field, value, known in (("norm", self.norm, NORMS), ("angles", self.angles, ANGLES)):
            if value not in known:
                raise OrthoRankError(f"{field} of the family {self.name!r} is {value!r}; it may be {', '.join(known)}")

    @property
    def note(self) -> str:
        """What `status` says of the family."""
        if self.input_norm is not None:
            return ""
        return f"{self.name} has no norm before attention: tokens are scored on the layer's input itself"
