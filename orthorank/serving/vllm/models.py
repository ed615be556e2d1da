"""vLLM's Llama, Mistral, Qwen2 and Qwen3 with a plan. vLLM imports this module when it loads one of them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from orthorank.packed import map_of, operator
from orthorank.packed.sinks import SinkBank
from orthorank.serving.vllm import attention, counts, hooks, maps, startup
from orthorank.serving.vllm.backend import Shared
from orthorank.serving.vllm.checks import check
from orthorank.serving.vllm.first_token import first_token_states
from orthorank.serving.vllm.layer import make_selecting
from orthorank.serving.vllm.removed import make_removed
from orthorank.serving.vllm.requests import RequestTable
from orthorank.serving.vllm.rules import params_of, without_layers
from orthorank.serving.vllm.serving import Serving
from orthorank.serving.vllm_interface import interface

BANK = 256  # first tokens whose sinks are kept, if a step has no more requests


class _WithPlan(nn.Module):
    """What each of vLLM's models is mixed with."""

    model: Any
    orthorank: Shared

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        serving = Serving.of(getattr(config, "orthorank", None))
        check(serving, vllm_config)
        interface.require(interface.WORKER)
        operator.find_layers_by(hooks.layer_named)
        hooks.watch_runner()
        hooks.watch_weights()
        plan, most = serving.plan, vllm_config.scheduler_config.max_num_seqs
        bank = SinkBank(lambda tokens: first_token_states(self.model, plan, tokens), max(BANK, most), batched=True)
        removed = tuple(index for index in plan.layers if plan.ratio(index) == 0)
        normed = tuple(index for index in removed if index in plan.ranks)
        dense = config.num_hidden_layers - len(plan.selecting) - len(removed)
        self.orthorank = Shared(serving, plan.selecting, bank, RequestTable(most), removed, normed, dense)
        interface.expect(self.model, **interface.OBJECTS["model"])
        contexts = vllm_config.compilation_config.static_forward_context
        for index in plan.layers:
            layer = self.model.layers[index]
            if index in plan.selecting:
                make_selecting(layer, index, self.orthorank, contexts)
            elif index in removed:
                make_removed(layer, contexts, corrected=index in normed)
            weight = layer.input_layernorm.weight
            if (layer_map := map_of(plan, index, weight.device, weight.dtype)) is not None:
                maps.hold(layer, layer_map)
        if hooks.parallel_group().rank_in_group == 0:  # the others do and count the same
            self.orthorank.counts = counts.of_this_process()
            self._say(bool(vllm_config.cache_config.enable_prefix_caching))

    def _say(self, caching: bool) -> None:
        """Once, in the server's log: what runs."""
        serving, path = self.orthorank.serving, None
        if self.orthorank.layers:
            layer = self.model.layers[self.orthorank.layers[0]]
            obstacle = attention.paged_obstacle(layer.self_attn.attn, layer.input_layernorm.weight.dtype)
            path = startup.attention_path(layer, obstacle)
        startup.LOGGER.info("%s", startup.line(serving, len(self.model.layers), path, caching=caching))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's, after which removed layers give back their memory; later, weights for these are passed over.

        Of a corrected one the input norm stays. The sinks' states are computed anew: they belong to the weights that
        were there before.
        """
        removed, normed = self.orthorank.removed, self.orthorank.normed
        gone = [index for index in removed if isinstance(self.model.layers[index].mlp, nn.Identity)]
        loaded: set[str] = super().load_weights(without_layers(weights, gone, normed))  # type: ignore[misc]
        for index in removed:
            layer = self.model.layers[index]
            for name, _ in list(layer.named_children()):
                if index not in normed or name != "input_layernorm":
                    setattr(layer, name, nn.Identity())
        self.orthorank.bank.forget()
        return loaded

    def get_model_state_cls(self) -> Any:
        """What the second model runner keeps of the requests: it tells the model of every new one."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        class ModelState(DefaultModelState):
            """Passes each request's prompt on."""

            def add_request(self, req_index: int, new_req_data: Any, *more: Any, **named: Any) -> None:
                """A new request in that row."""
                super().add_request(req_index, new_req_data, *more, **named)
                requests: RequestTable = self.model.orthorank.requests
                requests.add(req_index, new_req_data.prompt_token_ids, params_of(new_req_data))

        return ModelState


class OrthoRankLlamaForCausalLM(_WithPlan, LlamaForCausalLM):
    """Llama, and all that vLLM serves as Llama, with a plan."""


class OrthoRankMistralForCausalLM(_WithPlan, MistralForCausalLM):
    """Mistral with a plan."""


class OrthoRankQwen2ForCausalLM(_WithPlan, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with a plan."""


class OrthoRankQwen3ForCausalLM(_WithPlan, Qwen3ForCausalLM):
    """Qwen3 with a plan."""
