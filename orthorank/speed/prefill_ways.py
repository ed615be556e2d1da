"""Ways to run one prefill: eager, as a replayed CUDA graph, and compiled layer by layer.

Compiled: one decoder layer's code serves all others, whose shapes are its own, and the same goes for a layer that
selects. So compiling takes seconds whatever the depth of the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.families.known import decoder_of, device_of
from orthorank.hf.apply import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 3  # forwards before a capture: the first ones set up, and compile what is compiled
ALIKE = 0.02  # of the largest logit: how far a replay may be from the eager model


@contextmanager
def compiled_layers(model: "PreTrainedModel", backend: Any = "inductor") -> Iterator[None]:
    """Inside, every decoder layer of ``model`` runs compiled; a plan must be applied before.

    Args:
        model: a causal LM; calls inside have no cache and no padding.
        backend: of `torch.compile`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)).eval()
        >>> with compiled_layers(model, backend="eager"), torch.no_grad():
        ...     logits = model(torch.arange(12)[None], use_cache=False).logits
        >>> logits.shape
        torch.Size([1, 12, 64])
    """
    layers = list(decoder_of(model).layers)
    before = [layer._compiled_call_impl for layer in layers]  # the caller may have compiled them
    try:
        for layer in layers:
            layer.compile(backend=backend, dynamic=False)
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled


class Ways:
    """How the variants of a model run one prefill of ``prompt``.

    Args:
        graph: captured once for each variant, then replayed; compiled: layer by layer.
        logits_to_keep: positions from the end whose logits are computed; backend: of `torch.compile`.

    Raises:
        OrthoRankError: graph, and the model is not on a GPU.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        variants: Mapping[str, OrthoRankConfig | None],
        prompt: Tensor,
        *,
        logits_to_keep: int = 1,
        graph: bool = False,
        compiled: bool = False,
        backend: Any = "inductor",
    ) -> None:
        self.model, self.variants, self.prompt, self.logits_to_keep = model, variants, prompt, logits_to_keep
        self.compiled, self.backend = compiled, backend
        if graph and (device := device_of(model)).type != "cuda":
            raise OrthoRankError(
                f"graph is asked for and the model is on {device}; CUDA graphs are of GPUs: leave graph out, or choose "
                "a GPU as device"
            )
        self.replays = {name: self._captured(name) for name in variants} if graph else None

    @contextmanager
    def running(self, name: str) -> Iterator[Callable[[], Any]]:
        """Inside, the variant is in force, and what is given runs its prefill."""
        if self.replays is not None:
            yield self.replays[name]
            return
        with self._in_force(name):
            yield self._forward

    def _forward(self) -> Tensor:
        return self.model(input_ids=self.prompt, use_cache=False, logits_to_keep=self.logits_to_keep).logits

    @contextmanager
    def _in_force(self, name: str) -> Iterator[None]:
        plan = self.variants[name]
        layers = compiled_layers(self.model, self.backend) if self.compiled else nullcontext()
        with nullcontext() if plan is None else apply(self.model, plan), layers:
            yield

    @torch.inference_mode()
    def _captured(self, name: str) -> Callable[[], Any]:
        """The variant's forward as a graph, compared with the eager one."""
        with self._in_force(name):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    eager = self._forward()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = self._forward()
        graph.replay()
        torch.cuda.synchronize()
        apart, largest = (captured - eager).abs().max().item(), eager.abs().max().item()
        if not apart <= ALIKE * largest:
            raise OrthoRankError(
                f"the captured graph of {name} gives logits that differ from the eager model's by {apart:.3g} (the "
                f"largest is {largest:.3g}); measure without graph"
            )
        return graph.replay
