"""Whether a vLLM that is started here would serve a plan: what `orthorank env` and `orthorank doctor` say of it."""

import importlib.metadata
import importlib.util
import os
from dataclasses import asdict, dataclass
from typing import Any

from orthorank.serving.vllm import hooks
from orthorank.serving.vllm_interface import interface

NAME, GROUP = "orthorank", "vllm.general_plugins"


@dataclass(frozen=True)
class Installed:
    """What there is.

    Args:
        version: vLLM's, None where it is not installed; tested: the one that this package is tested with.
        obstacle: why vLLM would not know of a plan, with the remedy; None: it would.
    """

    version: str | None
    tested: str
    obstacle: str | None

    @property
    def plugin(self) -> str:
        """In words."""
        if self.version is None:
            return "not installed"
        return f"{self.version}; the plugin {self.obstacle or 'registers itself'}"

    def serves(self, model_type: str) -> bool:
        """Whether it would serve plans for models of that type."""
        return self.version is not None and self.obstacle is None and model_type in hooks.ARCHITECTURES

    def sentence(self, model_type: str) -> str:
        """The same in words."""
        known = ", ".join(hooks.ARCHITECTURES)
        if model_type not in hooks.ARCHITECTURES:
            return f"In vLLM a plan cannot be served for models of type {model_type}; it can for {known}."
        if self.version is None:
            return "vLLM, which can serve a plan for this type of model, is not installed."
        if self.obstacle is not None:
            return f"vLLM {self.version} would not serve a plan: its plugin {self.obstacle}."
        return f"vLLM {self.version} serves plans for this type of model (tested: {self.tested})."

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON stores them."""
        return asdict(self)


def installed() -> Installed:
    """Imports nothing of vLLM.

    Example:
        >>> installed().tested
        '0.32'
    """
    if importlib.util.find_spec("vllm") is None:
        return Installed(None, interface.TESTED, None)
    return Installed(interface.version(), interface.TESTED, _obstacle())


def left_out(plugins: str | None) -> str | None:
    """What of ``plugins``, the value of VLLM_PLUGINS, keeps the plugin out of vLLM, or None.

    Example:
        >>> left_out("others")
        "VLLM_PLUGINS is 'others', which leaves the plugin out: add orthorank to it, or unset it"
        >>> left_out("others,orthorank")
        >>> left_out(None)
    """
    if plugins is None or NAME in plugins.split(","):
        return None
    return f"VLLM_PLUGINS is {plugins!r}, which leaves the plugin out: add {NAME} to it, or unset it"


def _obstacle() -> str | None:
    if NAME not in {point.name for point in importlib.metadata.entry_points(group=GROUP)}:
        return f"is not known to this Python's packages ({GROUP}): install orthorank-kernels beside vLLM"
    if said := left_out(os.environ.get("VLLM_PLUGINS")):
        return f"is left out: {said}"
    if wrong := interface.missing():
        return f"does not register itself: {interface.sentence(wrong).removeprefix('orthorank: ')}"
    return None
