"""What the plugin tells vLLM when a process starts, or why it does not."""

import functools
from typing import Any

from orthorank.serving.vllm.hooks import ARCHITECTURES, MODELS
from orthorank.serving.vllm_interface import interface


def register() -> list[str]:
    """Register the models and their configuration checks: nothing that an engine without a plan would meet.

    Returns:
        What is not as expected; then nothing was registered.
    """
    if wrong := list(interface.differences(interface.REGISTERED)):
        return wrong
    from vllm import ModelRegistry
    from vllm.config import VllmConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    known, check = ModelRegistry.get_supported_archs(), _verifier()
    for architecture in ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
        MODELS_CONFIG_MAP.setdefault(architecture, check)
    _refuse_lost_plans(VllmConfig)
    return []


def _verifier() -> Any:
    """What vLLM asks of this package's architectures. What plans need is imported where there is one."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class Verifier(VerifyAndUpdateConfig):
        """For all OrthoRank models."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """See `checks.verify`."""
            from orthorank.serving.vllm.checks import verify

            verify(vllm_config)

    return Verifier


def _refuse_lost_plans(configs: Any) -> None:
    """Have vLLM's configuration refuse a plan beside an architecture that does not know of plans."""
    original = configs.try_verify_and_update_config
    if hasattr(original, "orthorank"):
        return

    @functools.wraps(original)
    def verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self, "model_config", None)
        if getattr(getattr(model, "hf_config", None), "orthorank", None) is not None:
            from orthorank.common.errors import OrthoRankError
            from orthorank.serving.vllm.checks import lost_plan

            for obstacle in lost_plan(model):
                raise OrthoRankError(obstacle)
        return original(self, *args, **kwargs)

    verify.orthorank = True  # type: ignore[attr-defined]
    configs.try_verify_and_update_config = verify
