"""Why each module of vLLM that `interface` names is reached into, and what of vLLM's public interface would do instead.

Public is what vLLM documents for plugins and users: registering models and their configuration checks, arguments of the
engine, parameters of requests, ``collective_rpc``, an attention backend that is chosen for all layers.
"""

from typing import NamedTuple


class Reason(NamedTuple):
    """Of a module's names, or of an object's attributes.

    Args:
        why: what they are for; public: the public way, and why it is not taken. "": there is none.
    """

    why: str
    public: str = ""


REASONS: dict[str, Reason] = {
    "vllm.model_executor.models.registry": Reason(
        "registers the four model classes", "taken: ModelRegistry.register_model"
    ),
    "vllm.config.compilation": Reason(
        "graphs are split at the selecting layers' operator, and vLLM's layers are found by their names",
        "splitting_ops is taken where the user sets it; where not, it would replace vLLM's own list and the rules that "
        "go with it, so the operator is added to the list that this comes from, in this engine's configuration alone",
    ),
    "vllm.config.vllm": Reason(
        "a plan beside an architecture that would not read it is refused, where every configuration is checked",
        "verify_and_update_config is asked of this package's architectures alone",
    ),
    "vllm.model_executor.models.config": Reason(
        "checks a plan against the engine's settings and chooses the scheduler",
        "VerifyAndUpdateConfig is; its table of architectures has no function to register with",
    ),
    "vllm.config.model": Reason("the model's configuration, which holds the plan"),
    "vllm.config.parallel": Reason("what is refused of parallel settings"),
    "vllm.config.cache": Reason("whether prompts may use blocks of earlier ones"),
    "vllm.config.scheduler": Reason("what is refused of the steps' sizes; the scheduler is set by scheduler_cls"),
    "vllm.sampling_params": Reason(
        "a request says how many tokens are its prompt's own, and that it is dense", "taken: extra_args"
    ),
    "vllm.pooling_params": Reason("the same of a request for embeddings", "extra_kwargs, which vLLM calls internal"),
    "vllm.v1.engine": Reason(
        "marks of requests, and a cache salt of their own for dense ones",
        "a client may send both itself; the front end knows which prompts are below min_prompt",
    ),
    "vllm.v1.engine.input_processor": Reason("where every request passes, with its tokens, before any is computed"),
    "vllm.exceptions": Reason("what servers answer as the client's fault"),
    "vllm.entrypoints.generate.beam_search.utils": Reason("beams come back as prompts, and say nothing of it"),
    "vllm.forward_context": Reason(
        "an operator finds its layer, its metadata and its slots, as vLLM's own attention does"
    ),
    "vllm.distributed.parallel_state": Reason("the ranks that share a layer; a bench ends its engines"),
    "vllm.platforms.interface": Reason("which float8 the cache holds"),
    "vllm.model_executor.layers.linear": Reason(
        "whether the merged weight may be used row by row", "the product of the whole weight, which is the other path"
    ),
    "vllm.model_executor.layers.rotary_embedding.base": Reason(
        "whether keys may be rotated as they are written to the cache, and the table of angles",
        "the two operations, which is the other path",
    ),
    "vllm.v1.attention.backend": Reason(
        "the step's metadata reach the selecting layers through the backend that vLLM chose",
        "the argument attn_backend= of Attention, which none of the four models hands on; --attention-backend, "
        "which is for all layers and would take the choice from vLLM",
    ),
    "vllm.v1.worker.gpu_input_batch": Reason("prompt lengths, which the first model runner tells no builder"),
    "vllm.v1.worker.gpu_model_runner": Reason(
        "which runner builds metadata; weights that change", "the second runner's model state, which is taken there"
    ),
    "vllm.v1.worker.gpu.model_states": Reason("the second model runner tells the model of new requests"),
    "vllm.v1.worker.gpu.model_states.default": Reason("the same", "taken: get_model_state_cls of the model"),
    "vllm.v1.core.sched.output": Reason("the prompt and parameters of a new request, for the second runner"),
    "vllm.v1.worker.gpu_worker": Reason("weights that change, in whatever way"),
    "vllm.v1.worker.worker_base": Reason(
        "what collective_rpc calls in every worker", "worker_extension_cls, which is one class and may be another's"
    ),
    "vllm.v1.core.sched.scheduler": Reason(
        "chunks end at windows, and blocks stay out of the prefix cache",
        "scheduler_cls, which is taken; the methods of a scheduler are not public",
    ),
    "vllm.v1.core.sched.async_scheduler": Reason("the same, one step ahead"),
    "vllm.v1.core.kv_cache_manager": Reason("how far a hit may reach"),
    "vllm.v1.core.kv_cache_coordinator": Reason("which blocks are kept"),
    "vllm.v1.request": Reason("what the scheduler knows of a request"),
    "vllm.entrypoints.llm": Reason("a bench ends the engine of each plan before the next", ""),
    "vllm.v1.engine.llm_engine": Reason("the same"),
    "vllm.v1.engine.core_client": Reason("the same"),
    "vllm.envs": Reason("a way to capture graphs, and a front end, that are refused"),
    "vllm.model_executor.models.mistral": Reason("queries of Mistral's that are scaled by their position"),
    "model": Reason("the layers, and the embedding that first tokens pass"),
    "layer": Reason(
        "a decoder layer's modules, of which a selecting layer makes another forward",
        "layer_type= (decoder_layer_type= of Qwen2) takes one class for all layers, which would have to tell by a name "
        "which layer it is, and would reach into the same modules; Qwen3 takes no argument",
    ),
    "norm": Reason("the kernels norm tokens themselves, and the last norm as vLLM does it"),
    "self_attn": Reason("projections and rotary embedding of the chosen rows"),
    "qkv_proj": Reason("the one weight of queries, keys and values"),
    "attention": Reason("the cache, its dtype and the backend's implementation"),
    "attention with a float8 cache": Reason("the scales of keys and values"),
    "backend": Reason("which builder and which cache the backend has"),
    "impl": Reason("its update of the cache, and its kernel for the portable path"),
    "runner": Reason("see vllm.v1.worker.gpu_model_runner"),
    "batch": Reason("see vllm.v1.worker.gpu_input_batch"),
    "scheduler": Reason("see vllm.v1.core.sched.scheduler"),
    "scheduler with a prefix cache": Reason("whether a hit could end inside a window"),
    "kv_cache_manager": Reason("see vllm.v1.core.kv_cache_coordinator"),
}
