"""A norm of a layer: computed from its weights by the kernels, or called where it does more than its class says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from orthorank.common.patching import has_hooks, has_own_forward, is_code_of_class

if TYPE_CHECKING:
    from orthorank.families import Family

IDENTITY: dict[str, Any] = {"weight": None, "eps": 1e-6, "norm": "identity"}  # what the kernels take where none is


@dataclass(frozen=True, eq=False)  # the hash of its fields, which some compilers ask for before there are any, fails
class Norm:
    """A norm of a layer, or its absence.

    Args:
        module: the layer's module; None: there is no norm here.
        kind: ``"rms"``, ``"layer"`` or ``"module"``; weight_offset: added to the weight, 1 for Gemma.
        home: the module of Python that the family's norms are code of; empty: any.
    """

    module: Any
    kind: str = "rms"
    weight_offset: float = 0.0
    home: str = ""

    @classmethod
    def of(cls, family: "Family", layer: nn.Module, name: str | None) -> "Norm":
        """The norm that ``layer`` calls ``name``, as ``family`` says; None: there is none."""
        home = "torch.nn.modules.normalization" if family.torch_norm else family.home
        return cls(name and getattr(layer, name), family.norm, family.weight_offset, home)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of ``x`` by the module itself; ``x`` where there is none."""
        return x if self.module is None else self.module(x)

    @property
    def eps(self) -> float:
        """What is added to the mean square."""
        return getattr(self.module, "eps" if hasattr(self.module, "eps") else "variance_epsilon")

    def is_weights(self, x: Tensor) -> bool:
        """Whether the kernels may compute the norm of ``x`` from its weights, or the module has to be called.

        It is called where the kernels do not know its kind, and where that does more than its class says, or something
        else: hooks, another class or forward (adapters, Liger-Kernel), weights that are sharded, parametrised or of
        another dtype than ``x``.
        """
        module = self.module
        if module is None:
            return True
        return (
            self.kind != "module"
            and is_code_of_class(type(module), self.home)
            and not has_hooks(module)
            and has_own_forward(module)
            and all(
                self._is_plain(getattr(module, name, None), x, needed=name == "weight") for name in ("weight", "bias")
            )
        )

    def _is_plain(self, weight: Any, x: Tensor, needed: bool) -> bool:
        if weight is None:
            return not needed
        kind = type(weight)  # a fake one stands for it where a program is traced or exported
        return (kind in (nn.Parameter, Tensor) or kind.__name__ == "FakeTensor") and weight.dtype == x.dtype

    @contextmanager
    def weights(self, x: Tensor) -> Iterator[dict[str, Any] | None]:
        """What the kernels norm ``x`` by, on the device where the norm runs: weight, eps, norm, bias, weight_offset.

        None where the module has to be called. ``accelerate`` keeps offloaded weights elsewhere until that.
        """
        module = self.module
        if module is None:
            yield IDENTITY
            return
        if not self.is_weights(x):
            yield None
            return
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(module)
        try:
            yield {
                "weight": module.weight,
                "eps": self.eps,
                "norm": self.kind,
                "bias": getattr(module, "bias", None),
                "weight_offset": self.weight_offset,
            }
        finally:
            if hook is not None:
                hook.post_forward(module, None)

    @contextmanager
    def applied(self, x: Tensor) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
        """`weights`, and None before them; where the module has to be called, the norm of ``x`` and the identity."""
        with self.weights(x) as how:
            if how is None:
                yield self.module(x), IDENTITY
            else:
                yield None, how
