"""Projections and MLPs in parts: rows of a fused weight, and what is SwiGLU. What somebody changed is called whole."""

from typing import Any

from torch import Tensor, nn

from orthorank.common.own_code import is_changed, is_code_of_class


def fused(projection: Any, normed: Tensor, groups: int, which: str) -> tuple[Tensor, ...]:
    """The queries, or keys and values, of one projection for all three.

    Rows of a plain linear layer's weight are taken; what is quantised, adapted, sharded or hooked runs whole.

    Args:
        groups: query heads for each key/value head; which: ``"q"`` or ``"kv"``.
    """
    weight: Any = getattr(projection, "weight", None)
    bias: Any = getattr(projection, "bias", None)
    plain = type(projection) is nn.Linear and type(weight) is nn.Parameter and not is_changed(projection)
    whole = None if plain else projection(normed)
    total = weight.shape[0] if whole is None else whole.shape[-1]
    kv = total // (groups + 2)
    rows = slice(0, total - 2 * kv) if which == "q" else slice(total - 2 * kv, total)
    if whole is None:
        part = nn.functional.linear(normed, weight[rows], None if bias is None else bias[rows])
    else:
        part = whole[..., rows]
    return (part,) if which == "q" else (part[..., :kv], part[..., kv:])


# Whose forward is down_proj(silu(gate) * up), if nobody changed it: gate and up of two projections, or of one.
SWIGLU = {
    "split": (
        "CohereMLP",
        "Cohere2MLP",
        "Ernie4_5MLP",
        "GraniteMLP",
        "HeliumMLP",
        "LlamaMLP",
        "MistralMLP",
        "Olmo2MLP",
        "Olmo3MLP",
        "Qwen2MLP",
        "Qwen2MoeMLP",
        "Qwen3MLP",
        "Qwen3MoeMLP",
        "SmolLM3MLP",
        "StableLmMLP",
    ),
    "fused": ("GlmMLP", "Phi3MLP"),
}


def swiglu_of(mlp: Any) -> str | None:
    """Which kind of SwiGLU ``mlp`` is; None: none that is known, or a changed one."""
    kind = type(mlp)
    found = next((name for name, classes in SWIGLU.items() if kind.__name__ in classes), None)
    activation = getattr(mlp, "activation_fn" if found == "fused" else "act_fn", None)
    plain = (
        found is not None
        and kind.__module__.startswith("transformers.models.")
        and is_code_of_class(kind, kind.__module__)
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and not is_changed(mlp)
        and not is_changed(activation)
    )
    return found if plain else None
