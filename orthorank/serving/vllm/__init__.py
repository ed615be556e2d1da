"""OrthoRank as a plugin of vLLM: an unmodified vLLM serves a plan.

vLLM calls `register` in every one of its processes (entry point group ``vllm.general_plugins``).
"""

import importlib.util
import logging
from typing import TYPE_CHECKING

from orthorank.common.exports import exports

if TYPE_CHECKING:
    from orthorank.serving.vllm.arguments import command_line, vllm_arguments
    from orthorank.serving.vllm.serving import Serving

__all__ = ["Serving", "command_line", "register", "vllm_arguments"]

_LOGGER = logging.getLogger("orthorank")


def register() -> None:
    """Tell vLLM of the OrthoRank models. Cheap, may be called again, does nothing where there is no vLLM.

    Where the installed vLLM is not as the plugin needs it, one sentence is logged and vLLM goes on without it: whatever
    happens here, models without a plan are served.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from orthorank.serving.vllm_interface import interface

    try:
        wrong = interface.missing()
        if not wrong:
            from orthorank.serving.vllm import registration

            wrong = registration.register()
    except Exception as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        _LOGGER.warning("%s", interface.sentence(wrong))


__getattr__, __dir__ = exports(
    __name__,
    {
        "orthorank.serving.vllm.arguments": ("command_line", "vllm_arguments"),
        "orthorank.serving.vllm.serving": ("Serving",),
    },
)
