"""What a worker of vLLM says of itself: an extension of it (vLLM's ``worker_extension_cls``)."""

from typing import Any

NAME = "orthorank.serving.vllm.probe.Probe"


class Probe:
    """Adds a method that ``LLM.collective_rpc("orthorank_about")`` calls in every worker."""

    get_model: Any  # the worker's

    def orthorank_about(self) -> dict[str, Any]:
        """Where the model runs, and how its selected queries attend.

        Returns:
            ``device`` (a GPU's name, or its kind), ``dtype``, ``threads`` of PyTorch's CPU operators, ``backend`` of
            attention, ``attention``: ``"paged"`` or ``"portable"``, None where no layer selects.
        """
        import torch

        inner = self.get_model().model
        weight = next(inner.parameters())
        paged = [layer.orthorank_paged for layer in inner.layers if hasattr(type(layer), "orthorank_paged")]
        attention = next(layer.self_attn.attn for layer in inner.layers if hasattr(layer.self_attn, "attn"))
        return {
            "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "backend": attention.attn_backend.get_name(),
            "attention": None if not paged else "paged" if all(paged) else "portable",
        }
