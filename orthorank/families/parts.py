"""The parts of one decoder layer as the selected layer's forward uses them, whatever the family.

Of a fused projection rows of the weight are taken, and SwiGLU is computed by a kernel; what somebody changed is called
whole.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from orthorank.common.errors import OrthoRankError, type_of
from orthorank.common.patching import is_changed, is_code_of_class, not_compiled
from orthorank.families import Family, split_heads
from orthorank.families.norm import IDENTITY, Norm
from orthorank_kernels import apply_rotary_at, gather_add_rms_norm, silu_and_mul

Tables = tuple[Tensor, Tensor]  # cos and sin


@dataclass(frozen=True)
class Parts:
    """The modules of one decoder layer, and what is read from them.

    Args:
        family: the spec that found them; layer: the decoder layer.
        input_norm: before attention; attn_out_norm: of attention's output; pre_mlp_norm: before the MLP;
            mlp_out_norm: of the MLP's output.
        parallel: the MLP reads what attention reads, not the sum after it.
    """

    family: Family
    layer: Any
    attention: Any
    mlp: Any
    input_norm: Norm
    attn_out_norm: Norm
    pre_mlp_norm: Norm
    mlp_out_norm: Norm
    parallel: bool

    @classmethod
    def of(cls, family: Family, layer: nn.Module) -> "Parts":
        """The modules of ``layer``; raises when the layer does not look as this spec says."""
        parallel = family.parallel(layer)
        norms = [
            family.input_norm,
            family.attn_out_norm,
            None if parallel else family.pre_mlp_norm,
            family.mlp_out_norm,
        ]
        names = [name for name in (*norms, family.attention, family.mlp) if name is not None]
        if missing := [name for name in names if not isinstance(getattr(layer, name, None), nn.Module)]:
            raise OrthoRankError(
                f"{type_of(layer)} has no {', '.join(missing)}, which {family.name} layers have by its spec; "
                + _remedy(
                    family, "say in its orthorank.Family what they are called, or None for a norm that there is not"
                )
            )
        into, attn_out, pre_mlp, mlp_out = (Norm.of(family, layer, name) for name in norms)
        attention, mlp = not_compiled(getattr(layer, family.attention)), getattr(layer, family.mlp)
        parts = cls(family, layer, attention, mlp, into, attn_out, pre_mlp, mlp_out, parallel)
        parts.check()
        return parts

    def check(self) -> None:
        """The attention has what is read from it, and is causal. A norm that is not the family's is called."""
        attention = self.attention
        projections = ("q_proj", "k_proj", "v_proj") if self.family.qkv is None else (self.family.qkv,)
        if missing := [
            name for name in (*projections, "o_proj", "head_dim", "scaling") if not hasattr(attention, name)
        ]:
            raise OrthoRankError(
                f"{type_of(attention)} has no {', '.join(missing)}, which the attention of {self.family.name} "
                "models has; if it was put into another module, take that off first; else "
                + _remedy(
                    self.family,
                    "such models cannot follow a plan: of these names, an orthorank.Family can say qkv alone",
                )
            )
        if not getattr(self.attention, "is_causal", True):
            raise OrthoRankError(
                "the model attends in both directions (use_bidirectional_attention); token selection is for causal "
                "attention: the sink's state must not depend on the tokens after it"
            )

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included; None for all."""
        return self.family.window(self.attention)

    @property
    def softcap(self) -> float | None:
        """What attention scores are capped at by a tanh; None: they are not."""
        if self.family.softcap is None or self.attention.config._attn_implementation == "sdpa":
            return None  # sdpa has no cap; older versions of transformers run it without, newer ones refuse it
        return getattr(self.attention, self.family.softcap)

    @property
    def sinks(self) -> Tensor | None:
        """A logit for each head that joins the softmax's denominator, ``[heads]``; None: there are none."""
        if self.family.sinks is None:
            return None
        hook = getattr(self.attention, "_hf_hook", None)
        if hook is None:
            return getattr(self.attention, self.family.sinks)
        hook.pre_forward(self.attention)  # accelerate keeps offloaded ones elsewhere until then
        sinks: Tensor = getattr(self.attention, self.family.sinks)
        hook.post_forward(self.attention, None)
        return sinks

    @property
    def residual_scale(self) -> float:
        """Factor on what attention and MLP add to the residual stream."""
        return 1.0 if self.family.residual_scale is None else getattr(self.layer, self.family.residual_scale)

    def tables(self, position_embeddings: Tables) -> Tables | None:
        """cos and sin as the kernels take them, column j for pair j of channels; None: this layer rotates nothing.

        Args:
            position_embeddings: the model's, ``[batch or 1, tokens, rotary_dim]``.
        """
        if not self.family.rotates(self.attention):
            return None
        cos, sin = position_embeddings
        if self.family.angles != "pairs":
            return cos, sin
        return cos[..., ::2].contiguous(), sin[..., ::2].contiguous()  # each column stands there twice, side by side

    def rotate(self, heads: Tensor, tables: Tables | None, positions: Tensor | None = None) -> Tensor:
        """``heads`` ``[batch, heads, selected, head_dim]`` rotated; positions: rows of the tables, None for all."""
        if tables is None:
            return heads
        of = self.rotation(tables)
        how = {"interleaved": of["rotary_interleaved"], "rotary_dim": of["rotary_dim"]}
        return apply_rotary_at(heads, of["rotary_cos"], of["rotary_sin"], positions, **how)

    def rotation(self, tables: Tables | None) -> dict[str, Any]:
        """What `sparse_query_attention` takes to rotate its queries by ``tables``."""
        if tables is None:
            return {}
        cos, sin = tables
        width = cos.shape[-1] if self.family.angles == "halves" else cos.shape[-1] * 2
        of = {"rotary_cos": cos, "rotary_sin": sin}
        return {**of, "rotary_interleaved": self.family.interleaved, "rotary_dim": width}

    def keys_and_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (not yet rotated) and values ``[batch, kv_heads, tokens, head_dim]`` of ``[batch, tokens, hidden]``."""
        attention = self.attention
        if self.family.qkv is None:
            keys, values = attention.k_proj(normed), attention.v_proj(normed)
        else:
            keys, values = fused(getattr(attention, self.family.qkv), normed, attention.num_key_value_groups, "kv")
        return self.family.heads(attention, "k", keys), split_heads(attention, values)

    def queries(self, normed: Tensor) -> Tensor:
        """Queries (not yet rotated) ``[batch, heads, tokens, head_dim]`` of ``normed`` ``[batch, tokens, hidden]``."""
        attention = self.attention
        if self.family.qkv is None:
            projected = attention.q_proj(normed)
        else:
            (projected,) = fused(getattr(attention, self.family.qkv), normed, attention.num_key_value_groups, "q")
        return self.family.heads(attention, "q", projected)

    def output(self, attn_out: Tensor) -> Tensor:
        """The output projection of ``attn_out`` ``[batch, heads, tokens, head_dim]``."""
        batch, _, tokens, _ = attn_out.shape
        projected = self.attention.o_proj(attn_out.transpose(1, 2).reshape(batch, tokens, -1))
        return self._dropped(self.family.attn_out_dropout, projected)

    def add_and_norm(
        self, hidden_states: Tensor, positions: Tensor, addend: Tensor, selected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and what the MLP reads, both ``[batch, selected, hidden]``.

        Args:
            addend: attention's output; selected: what attention read, of the same tokens.
        """
        inner, post = self.attn_out_norm, self.pre_mlp_norm
        if inner.module is not None and (
            not inner.is_weights(addend) or (post.module is not None and inner.eps != post.eps)  # one pass has one eps
        ):
            addend, inner = inner(addend).to(hidden_states.dtype), Norm(None)
        with inner.weights(addend) as inner_options, post.weights(hidden_states) as behind:
            assert inner_options is not None  # else its module was called
            options = IDENTITY if behind is None else behind
            eps = inner_options["eps"] if options["norm"] == "identity" else options["eps"]
            offset = max(inner_options.get("weight_offset", 0.0), options.get("weight_offset", 0.0))
            residual, normed = gather_add_rms_norm(
                hidden_states,
                positions,
                addend,
                scale=self.residual_scale,
                addend_weight=inner_options["weight"],
                **options | {"eps": eps, "weight_offset": offset},
            )
        if behind is None:
            normed = post(residual)
        return residual, selected if self.parallel else normed

    def feed_forward(self, normed: Tensor) -> Tensor:
        """What the MLP adds, ``normed`` being ``[batch, tokens, hidden]``.

        Activation and product are one pass if the MLP is SwiGLU. The projections are called as modules, so that
        quantised and adapted ones, and their hooks, are what they are. Of a mixture of experts router and experts see
        these tokens alone.
        """
        kind = swiglu_of(self.mlp)
        if kind == "fused":
            mlp_out = self.mlp.down_proj(silu_and_mul(self.mlp.gate_up_proj(normed)))
        elif kind == "split":
            mlp_out = self.mlp.down_proj(silu_and_mul(self.mlp.gate_proj(normed), self.mlp.up_proj(normed)))
        else:
            mlp_out = self.mlp(normed)
            mlp_out = mlp_out[0] if isinstance(mlp_out, tuple) else mlp_out  # experts may give the router's logits, too
        return self._dropped(self.family.mlp_out_dropout, self.mlp_out_norm(mlp_out))

    def _dropped(self, name: str | None, x: Tensor) -> Tensor:
        if name is None or not self.layer.training:
            return x
        drop = attrgetter(name)(self.layer)
        return drop(x) if callable(drop) else nn.functional.dropout(x, drop)


def _remedy(family: Family, own: str) -> str:
    """What to do where a layer has not what ``family`` says; ``own``: of a family that is not the package's."""
    return OLDER if family.home else own


OLDER = "the installed transformers may be newer than this package: see the supported range in the README"


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


# Whose forward is down_proj(silu(gate) * up), unless a library changed it: gate and up of two projections, or of one.
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
