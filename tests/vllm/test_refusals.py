"""What cannot be served is refused before anything is loaded, with the reason and the remedy."""

import re
from pathlib import Path
from typing import Any

import pytest

from orthorank.common.errors import OrthoRankError
from orthorank.serving.vllm.attention import backend_obstacle
from orthorank.serving.vllm.hooks import OPERATOR
from orthorank.serving.vllm.serving import Serving
from orthorank.serving.vllm_interface import interface
from tests.vllm.engines import PLAN, WHOLE_PROMPTS, WINDOW, corrected, served, settings

pytestmark = pytest.mark.vllm
CONNECTED = {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_producer"}}
OTHER_CLASS = {"architectures": ["OrthoRankQwen2ForCausalLM"], "orthorank": PLAN}


@pytest.mark.parametrize(
    ("plan", "others", "said"),
    [
        (PLAN, {"enable_prefix_caching": False, "enable_chunked_prefill": True}, "--no-enable-chunked-prefill"),
        (PLAN, {"enable_prefix_caching": True, "enable_chunked_prefill": False}, "--no-enable-prefix-caching"),
        (PLAN | {"layers": [0, 2]}, WHOLE_PROMPTS, "layer 0 selects"),
        (PLAN | {"sink_layer": 1}, WHOLE_PROMPTS, "the sink forms in layer 1"),
        (PLAN | {"layers": [1, 9]}, WHOLE_PROMPTS, "the model has layers 0 to 3"),
        (PLAN | {"hidden_size": 64}, WHOLE_PROMPTS, "hidden_size 64 and this one has 128"),
        (PLAN | {"criterion": "random"}, WHOLE_PROMPTS, "criterion is 'random'"),
        (PLAN | {"kv": "selected"}, WHOLE_PROMPTS, "kv is 'selected'"),
        (PLAN | {"update_sink": True}, WHOLE_PROMPTS, "update_sink is True"),
        (PLAN | {"sinks": "auto"}, WHOLE_PROMPTS, "sinks is 'auto'"),
        (PLAN, WHOLE_PROMPTS | {"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        (PLAN, WHOLE_PROMPTS | {"enable_lora": True}, "merge the adapter"),
        (PLAN, WHOLE_PROMPTS | CONNECTED, "which selecting layers do not call"),
        (PLAN, WHOLE_PROMPTS | {"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        (WINDOW, {"max_num_batched_tokens": 16, "max_num_seqs": 4}, "--max-num-batched-tokens is 16"),
        (WINDOW, {"max_num_batched_tokens": 34, "max_num_seqs": 4}, "a step needs 35"),
        (WINDOW | {"keep_last": 2}, {}, "keep_last is 2"),
        (PLAN | {"keep_ratoi": 0.5}, WHOLE_PROMPTS, "keep_ratoi"),
        (PLAN, WHOLE_PROMPTS | {"hf_overrides": {"orthorank": PLAN}}, "would be served dense, as if there were none"),
        (PLAN, WHOLE_PROMPTS | {"hf_overrides": OTHER_CLASS}, "which is served by 'OrthoRankLlamaForCausalLM'"),
        ({"plan": PLAN, "reuse": "some"}, WHOLE_PROMPTS, "reuse is 'some'"),
        (7, WHOLE_PROMPTS, "orthorank = 7"),
    ],
)
def test_refused_by_the_front_end(llama: Path, plan: Any, others: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)):
        _configure(llama, plan, **others)


@pytest.mark.parametrize("name", ["VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_USE_RUST_FRONTEND"])
def test_refused_of_the_environment(llama: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(Exception, match=rf"{name} is set, .*; unset it"):
        _configure(llama, PLAN, **WHOLE_PROMPTS)
    _configure(llama, None)


def test_what_is_served_is_not_refused(llama: Path) -> None:
    """And the plan's own scheduler is set where windows need it."""
    assert _configure(llama, PLAN, **WHOLE_PROMPTS).scheduler_config.scheduler_cls is None
    found = _configure(llama, WINDOW).scheduler_config.scheduler_cls
    assert found == "orthorank.serving.vllm.scheduler.make_scheduler"


def test_maps_that_every_worker_would_refuse(llama: Path, tmp_path: Path) -> None:
    """What the front end read is what each worker must find, by its hash; also where it was told a path."""
    folder = corrected(tmp_path / "plan", PLAN, [1, 2])
    told = served(folder)
    read = [_configure(llama, plan, **WHOLE_PROMPTS).model_config.hf_config.orthorank for plan in (told, str(folder))]
    corrected(folder, PLAN, [1, 2], maps_dtype="bfloat16")  # another plan, whole in itself
    for plan in read:
        assert plan == told
        with pytest.raises(OrthoRankError, match=r"correction\.safetensors holds maps with the hash .*each node needs"):
            Serving.of(plan)
    with pytest.raises(Exception, match="holds maps with the hash"):
        _configure(llama, told, **WHOLE_PROMPTS)
    folder.rename(tmp_path / "gone")
    with pytest.raises(Exception, match=r"plan/correction\.safetensors, which is not there"):
        _configure(llama, told, **WHOLE_PROMPTS)
    small = corrected(tmp_path / "small", PLAN, [1, 2], hidden=64)
    with pytest.raises(Exception, match="maps of hidden size 64, and the model's is 128"):
        _configure(llama, served(small), **WHOLE_PROMPTS)


GROUPS = {
    "registered": interface.REGISTERED,
    "front": interface.FRONT,
    "worker": interface.WORKER,
    "scheduler": interface.SCHEDULER,
    "bench": interface.BENCH,
    "optional": interface.OPTIONAL,
}


def test_implementations_of_attention_are_as_they_are_expected(llama: Path) -> None:
    """Of the backends that this build can import; an engine's own objects are looked at as it is built."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    others = {"num_kv_heads": 2, "alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(_configure(llama, None)):
        for backend in (CPUAttentionBackend, TritonAttentionBackend):
            interface.expect(backend, **interface.OBJECTS["backend"])
            interface.expect(backend.get_impl_cls()(4, 32, 0.5, **others), **interface.OBJECTS["impl"])


@pytest.mark.parametrize("group", GROUPS)
def test_this_vllm_is_as_it_is_expected(group: str) -> None:
    assert interface.missing() == []
    interface.require(GROUPS[group])


def test_a_private_name_that_changed_is_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a plan is read; without a plan nobody asks."""
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr(InputProcessor, "process_inputs", None)
    with pytest.raises(Exception, match=r"InputProcessor.process_inputs is None, not a function; this package"):
        _configure(llama, PLAN, **WHOLE_PROMPTS)
    _configure(llama, None)


def test_backends_that_selecting_layers_cannot_have() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

    assert backend_obstacle(CPUAttentionBackend) is None
    assert "FLEX_ATTENTION has room for --max-num-seqs requests" in (backend_obstacle(FlexAttentionBackend) or "")


def test_operator_splits_graphs(llama: Path) -> None:
    """Those of an engine with a plan; one without a plan is configured as ever, also beside one that has one."""
    for plan, others in ((PLAN, WHOLE_PROMPTS), (None, {})):
        config = _configure(llama, plan, **others, enforce_eager=False).compilation_config
        assert (OPERATOR in _splitting(config)) == (plan is not None)
        assert config.splitting_ops_contain_attention()
        assert OPERATOR not in type(config)._attention_ops
    assert _configure(llama, None).scheduler_config.scheduler_cls is None
    chosen = {"splitting_ops": ["vllm::unified_attention"]}
    config = _configure(llama, PLAN, **WHOLE_PROMPTS, enforce_eager=False, compilation_config=chosen).compilation_config
    assert config.splitting_ops == ["vllm::unified_attention", OPERATOR]


def _splitting(config: Any) -> list[str]:
    """The operators at which a GPU's graphs would be split: a CPU compiles in another mode."""
    from vllm.config import CompilationMode

    config.mode, config.splitting_ops = CompilationMode.VLLM_COMPILE, None
    config.set_splitting_ops_for_v1("allgather_reducescatter")
    return list(config.splitting_ops)


def _configure(folder: Path, plan: Any, **others: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**settings(folder, plan, **others)).create_engine_config()
