"""Whether a layer is what its family's spec says, before it is run from its parts instead of being called.

A selected layer calls its projections, its MLP and, where they are more than their weights, its norms. It does not call
its own class's forward, nor its attention: what was hung on those would be left out silently. So it is looked at,
when the plan is applied and before each call that is not compiled, and refused by name.
"""

from functools import cache
from typing import Any, NoReturn

from torch import nn

from orthorank.common.errors import OrthoRankError
from orthorank.common.patching import has_own_forward, home_of, is_bound, is_code_of, name_of
from orthorank.families import Family
from orthorank.families.parts import Parts

HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
# What a module's own __call__ runs; the second, where it is there, in place of the first: what torch.compile made.
CALLS = ("_call_impl", "_compiled_call_impl")
# Hooks that only listen, for outputs which a plan refuses to give.
LISTENERS = ("transformers.utils.output_capturing",)
# Functions of a modelling file that attention calls. Liger-Kernel's and the Hub's are the same, faster.
FUNCTIONS = ("apply_rotary_pos_emb", "eager_attention_forward")
REMEDY = "take it off, hang it on what is called instead, "
MAKERS = ("transformers.", "liger_kernel.", "kernels.", "orthorank.")


class TakenApart:
    """One layer that a plan runs from its parts.

    What is looked at is found once; `check` then compares it with what is there.

    Args:
        family: the spec; layer: the decoder layer; index: its number.
        beneath: the forward of its own that the layer had before a plan was applied; None: that of its class.

    Raises:
        OrthoRankError: it is not what the spec says; the message names what, why, and what to do.
    """

    def __init__(self, family: Family, layer: Any, index: int, beneath: Any) -> None:
        self.family, self.layer, self.index, self.beneath = family, layer, index, beneath
        self.parts: Parts | None = None
        self._seen: Seen | None = None
        self.check()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"parts": None, "_seen": None}  # a copy finds its own

    def check(self, implementation: str | None = None) -> Parts:
        """The layer's parts, if it still is what it was found to be.

        Args:
            implementation: the model's `implementation_of`, asked once for all layers; None: ask.
        """
        if self.parts is None or self._seen is None or not self._seen.holds(implementation):
            check_classes(self.family, self.layer, self.index)
            parts = Parts.of(self.family, self.layer)
            self._check_layer()
            self._check_attention(parts.attention)
            around = getattr(self.layer, self.family.attention)  # the same, or what torch.compile puts around it
            self._check_hooks(around)
            self._check_functions(parts.attention)
            self.parts, self._seen = parts, Seen(self.layer, parts.attention, around)
        return self.parts

    def _check_layer(self) -> None:
        kind = type(self.layer)
        if self.beneath is not None and not is_bound(self.beneath, self.layer):
            self._refuse("the layer", f"a forward of its own, {name_of(self.beneath)}, set before the plan was applied")
        if not is_code_of(kind.forward, self.family.home):
            self._refuse("the layer", f"the forward that its class {kind.__name__} was given, {name_of(kind.forward)}")

    def _check_attention(self, attention: Any) -> None:
        where, kind = f"its {self.family.attention}", type(attention)
        if not has_own_forward(attention):
            hook = vars(attention).get("_hf_hook")
            own = vars(attention)["forward"]
            said = name_of(own) if hook is None else f"{type(hook).__name__}, a hook of accelerate"
            self._refuse(where, f"a forward of its own, {said}")
        if not is_code_of(kind.forward, self.family.home):
            self._refuse(where, f"the forward that its class {kind.__name__} was given, {name_of(kind.forward)}")
        if kind.__call__ is not nn.Module.__call__:
            self._refuse(where, f"the __call__ of its class {kind.__name__}")
        for name in CALLS:
            called = getattr(attention, name)
            if called is not None and not home_of(called).startswith("torch."):
                self._refuse(where, f"a {name} of its own, {name_of(called)}")
        self._check_hooks(attention)

    def _check_hooks(self, attention: Any) -> None:
        for name, word in HOOKS.items():
            for hook in vars(attention)[name].values():
                if home_of(hook) not in LISTENERS:
                    self._refuse(f"its {self.family.attention}", f"the {word} {name_of(hook)}")

    def _check_functions(self, attention: Any) -> None:
        """Attention's own functions: of its modelling file, and the one that ``attn_implementation`` names."""
        if not self.family.home:
            return
        where, implementation = f"its {self.family.attention}", attention.config._attn_implementation
        known = getattr(type(attention).forward, "__globals__", {})
        for name in FUNCTIONS:
            eager_is_unused = name == "eager_attention_forward" and implementation != "eager"
            if name in known and not eager_is_unused and not home_of(known[name]).startswith(MAKERS):
                self._refuse(where, f"the {name} that its modelling file was given, {name_of(known[name])}")
        function = registered(implementation)
        if function is not None and "/" not in implementation and not home_of(function).startswith(MAKERS):
            self._refuse(
                where,
                f"the attention function {implementation!r}, {name_of(function)}",
                'call model.set_attn_implementation("sdpa"), ',
            )

    def _refuse(self, where: str, what: str, remedy: str = REMEDY) -> NoReturn:
        raise OrthoRankError(
            f"layer {self.index} selects tokens, so the layer and its {self.family.attention} are run from their parts "
            f"and not called: {where} has {what}, which would be left out. What is called: the layer's hooks, its "
            f"norms, projections and MLP. Please {remedy}or leave layer {self.index} out of the plan's layers"
        )


class Seen:
    """What was looked at, so that the next look is a comparison of references."""

    def __init__(self, layer: Any, attention: Any, around: Any) -> None:
        self.layer, self.attention = layer, attention
        self.own = attention.__dict__
        self.children = dict(layer._modules)
        self.forwards = type(layer).forward, type(attention).forward
        self.call = type(attention).__call__
        self.replaced = [(name, self.own.get(name)) for name in ("forward", "_hf_hook", *CALLS)]
        self.implementation = implementation_of(attention.config)
        self.function = registered(self.implementation)
        self.globals = getattr(type(attention).forward, "__globals__", {})
        self.functions = [(name, self.globals.get(name)) for name in FUNCTIONS]
        self.hooks = [(vars(m), name, dict(vars(m)[name])) for m in {attention, around} for name in HOOKS]

    def holds(self, implementation: str | None) -> bool:
        """Whether nothing changed."""
        own = self.own
        if implementation is None:
            implementation = implementation_of(self.attention.config)
        if (
            type(self.layer).forward is not self.forwards[0]
            or type(self.attention).forward is not self.forwards[1]
            or type(self.attention).__call__ is not self.call
            or implementation != self.implementation
            or registered(implementation) is not self.function
            or self.layer._modules != self.children
        ):
            return False
        for name, replaced in self.replaced:
            if own.get(name) is not replaced:
                return False
        for of_module, name, seen in self.hooks:  # by name: the dictionary itself may be replaced
            hooks = of_module[name]
            if hooks != seen if seen else hooks:
                return False
        return all(self.globals.get(name) is function for name, function in self.functions)


def implementation_of(config: Any) -> str | None:
    """The name of the attention function. A configuration takes long to tell, so its dictionary is asked."""
    own = object.__getattribute__(config, "__dict__")
    name = "_attn_implementation_internal"
    return own[name] if name in own else config._attn_implementation  # noqa: SIM401, the default would be asked for


def registered(implementation: str | None) -> Any:
    """The attention function that transformers has under that name; None: it has none ("eager", for example)."""
    functions = _functions()
    return functions[implementation] if implementation in functions else None  # noqa: SIM401, `get` is slower


@cache
def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def check_classes(family: Family, layer: Any, index: int) -> None:
    """Layer and attention are of the family's classes, or of subclasses of these.

    Raises:
        OrthoRankError: a model whose config names a known model type has other classes.
    """
    attention = getattr(layer, family.attention, layer)
    for module in (
        layer,
        getattr(attention, "_modules", {}).get("_orig_mod", attention),
    ):  # torch.compile's, without it
        if family.home and not any(kind.__module__ == family.home for kind in type(module).__mro__):
            kind = type(module)
            raise OrthoRankError(
                f"layer {index} has a {kind.__name__} of {kind.__module__}, and {family.name} models have classes of "
                f"{family.home}: what another class computes is not known, whatever the config's model_type says; load "
                "the model with transformers' own classes (trust_remote_code=False), take the wrapper off, or leave "
                f"layer {index} out of the plan's layers"
            )
