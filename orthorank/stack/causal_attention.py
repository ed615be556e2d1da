"""Dense attention that stays the same when a model is captured or compiled: SDPA with ``is_causal``, never a mask.

Transformers' own ``"sdpa"`` gives PyTorch ``is_causal=True`` and grouped heads in eager mode alone. While it is traced
or captured it builds a mask ``[batch, 1, tokens, tokens]`` and repeats keys and values for every query head: another,
slower model, beside which a plan would look better than it is. The attention registered here does the same in every
mode, for prompts that need no mask; what would need one is refused.

Padding on the right needs no mask either: no token of a row sees what stands behind it. So a second name,
``"sdpa_causal_right_padded"``, lets it pass, for prompts that are padded to the length of a captured graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from orthorank.calls.masks import PACKED
from orthorank.common.errors import OrthoRankError

NAME = "sdpa_causal"
RIGHT_PADDED = "sdpa_causal_right_padded"


def register_causal_attention(*, right_padded: bool = False) -> str:
    """Make ``"sdpa_causal"`` known to transformers as an attention implementation; again does no harm.

    Args:
        right_padded: whether prompts may be padded on the right: ``"sdpa_causal_right_padded"``. What layers make of
            the padding means nothing; the mask says to a plan what is padding. A mask with padding elsewhere is
            refused, except while a graph is made, where it cannot be looked at.

    Returns:
        The name, for ``attn_implementation`` or ``model.set_attn_implementation``.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)).eval()
        >>> ids = torch.arange(12)[None]
        >>> plain = model(ids).logits
        >>> model.set_attn_implementation(register_causal_attention())
        >>> torch.allclose(model(ids).logits, plain, atol=1e-5)
        True
        >>> model.set_attn_implementation(register_causal_attention(right_padded=True))
        >>> padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.arange(16)[None] < 12
        >>> torch.allclose(model(padded, attention_mask=mask).logits[:, :12], plain, atol=1e-5)
        True
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name, mask = (RIGHT_PADDED, no_mask_but_right_padding) if right_padded else (NAME, no_mask)
    AttentionInterface.register(name, causal_attention)
    AttentionMaskInterface.register(name, mask)
    return name


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a whole unpadded prompt, or of one generated token over those before it.

    Args:
        module: the attention module, unused; query: ``[batch, heads, tokens, head_dim]``.
        key, value: ``[batch, kv_heads, keys, head_dim]``, as many keys as tokens, or one token.
        attention_mask: None.
        scaling: of the scores; None: ``head_dim ** -0.5``. kwargs: as transformers gives them.

    Returns:
        ``[batch, tokens, heads, head_dim]`` and None.

    Raises:
        OrthoRankError: a mask, a sliding window shorter than the keys, a soft-cap, packed sequences, or a part of a
            prompt over a filled cache.
    """
    tokens, keys, window = query.shape[2], key.shape[2], kwargs.get("sliding_window")
    if attention_mask is not None:
        raise _refusal(f"attention_mask is a tensor of shape {list(attention_mask.shape)}", "takes no mask")
    if window is not None and keys > window:
        raise _refusal(f"the model has a sliding window of {window} and {keys} keys", "sees all keys before a token")
    if kwargs.get("softcap") is not None:
        raise _refusal(f"the model caps scores at {kwargs['softcap']}", "has no cap")
    if named := [name for name in PACKED if kwargs.get(name) is not None]:
        raise _refusal(f"{named[0]} was given", "takes one sequence a row")
    if tokens not in (1, keys):
        raise _refusal(f"the call has {tokens} tokens and {keys} keys", "takes a whole prompt, or one token at a time")
    attn_out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        scale=scaling,
        is_causal=tokens > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attn_out.transpose(1, 2).contiguous(), None


def no_mask(
    *, attention_mask: Tensor | None = None, q_length: Any = 1, kv_length: Any = 1, q_offset: Any = 0, **kwargs: Any
) -> None:
    """What transformers asks for a mask: there is none. Without this function it would drop a padding mask unsaid.

    Args:
        attention_mask: ``[batch, tokens]``, 1 for tokens, or None; q_length, kv_length, q_offset: tokens of the call,
            keys, tokens before the call.

    Raises:
        OrthoRankError: there is padding (while a graph is traced or captured: a mask at all), or a static cache.
    """
    if attention_mask is not None:
        if torch.compiler.is_compiling() or _capturing(attention_mask):
            raise _refusal("attention_mask was given while a graph is made", "cannot see whether it hides anything")
        if not bool(attention_mask.all()):
            raise _refusal("attention_mask has padding", "takes prompts of one length")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_length:
        raise _refusal("the call has a cache that is allocated ahead of time", "would see its empty places")


def no_mask_but_right_padding(
    *, attention_mask: Tensor | None = None, q_length: Any = 1, kv_length: Any = 1, q_offset: Any = 0, **kwargs: Any
) -> None:
    """`no_mask` where rows may be padded on the right, over their prompts.

    Raises:
        OrthoRankError: padding elsewhere, as far as it can be seen; padding and keys from before the call; a static
            cache.
    """
    no_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset)
    if attention_mask is None or torch.compiler.is_compiling() or _capturing(attention_mask):
        return
    mask = attention_mask != 0
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise OrthoRankError(
            f"attention_mask has padding before tokens, and the attention {RIGHT_PADDED!r} lets every token see all "
            "before it: pad on the right, or call model.set_attn_implementation('sdpa')"
        )
    if q_offset and not bool(mask.all()):
        raise OrthoRankError(
            f"attention_mask has padding in the cache of the call, and the attention {RIGHT_PADDED!r} would see it: "
            "crop the cache to the prompt's length (cache.crop), or call model.set_attn_implementation('sdpa')"
        )


def _capturing(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refusal(found: str, reason: str) -> OrthoRankError:
    return OrthoRankError(
        f"{found}, and the attention {NAME!r} {reason}: leave it out, pass prompts of one length without padding, or "
        "call model.set_attn_implementation('sdpa')"
    )
