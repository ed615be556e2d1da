"""Engines in processes of their own: compiled, the second model runner, tensor parallel, a server, two nodes."""

import urllib.error
from pathlib import Path

import pytest

from tests.vllm.engines import (
    PLAN,
    WHOLE_PROMPTS,
    WINDOW,
    Answer,
    check,
    converse,
    engine,
    expect,
    prompts,
    settings,
    unlike,
)
from tests.vllm.jobs import SECOND, TWO_RANKS, answers, compiled_by, run_job
from tests.vllm.servers import SERVER, complete, post, running, server_arguments, wait_until_healthy

pytestmark = pytest.mark.vllm
LENGTHS = [7, 30, 64, 200]


@pytest.mark.parametrize("compiler", ["dynamo", "inductor"])
def test_compiled(tmp_path: Path, llama: Path, compiler: str) -> None:
    """The selecting layers are operators at which the compiled graph is split. One prompt is not selected from."""
    plan = PLAN | {"min_prompt": 20}
    chosen = settings(llama, plan, **WHOLE_PROMPTS, enforce_eager=False)
    found = answers(tmp_path, chosen, prompts(LENGTHS), compiled_by(compiler, tmp_path))
    check(found, expect(llama, plan, prompts(LENGTHS)))
    unlike(found[:1], expect(llama, PLAN, prompts(LENGTHS[:1])))


def test_second_model_runner(tmp_path: Path, llama: Path) -> None:
    """The one that GPUs run: its kernels in Triton's interpreter. One prompt is too short to be selected from."""
    plan, asked = PLAN | {"min_prompt": 20}, prompts([7, 30, 64, 110])
    check(answers(tmp_path, settings(llama, plan, **WHOLE_PROMPTS), asked, SECOND), expect(llama, plan, asked))


def test_second_model_runner_with_a_prefix_cache(tmp_path: Path, untied: dict[str, Path]) -> None:
    """Preemption with prefix caching, hits, a session, other weights, dense requests: one engine, blocks for some 350
    tokens.
    """
    first, second = untied["first"], untied["second"]
    (long,) = prompts([100], seed=3)
    together, hits = prompts([70, 75, 80], seed=4), [long, [*long[:70], *long[:30]], long]
    inputs = [prompts([70], seed=6)[0], prompts([40], seed=7)[0]]
    steps = [
        {"ask": together, "tokens": 60},
        {"one by one": hits},
        {"converse": inputs, "tokens": 8},
        {"reload": str(second)},
        {"one by one": [long]},
        {"one by one": [long, long], "sampling": {"extra_args": {"orthorank_dense": True}}},
    ]
    chosen = settings(first, WINDOW, num_gpu_blocks_override=11, max_num_batched_tokens=100, max_model_len=256)
    found = run_job(tmp_path, {"settings": chosen, "steps": steps}, SECOND)
    answers = [[Answer(*answer) for answer in step["answers"]] for step in found]
    assert all(step["runner"] for step in found)
    assert found[0]["thrown out"] > 0
    check(answers[0], expect(first, WINDOW, together, tokens=60))
    assert found[1]["cached"] == [0, 64, 96]
    check(answers[1], expect(first, WINDOW, hits))
    with engine(first, WINDOW, max_num_batched_tokens=100) as of_the_first_runner:
        check(answers[2], converse(of_the_first_runner, inputs, 8))
    check(answers[4], expect(second, WINDOW, [long]))
    dense = expect(second, WINDOW | {"keep_ratio": 1.0}, [long])
    assert found[5]["cached"] == [0, 96]  # blocks of dense prompts alone
    check(answers[5], dense * 2)
    unlike(dense, answers[4])


@pytest.mark.parametrize("scores", ["own", "first rank"])
def test_tensor_parallel(tmp_path: Path, llama: Path, scores: str) -> None:
    """Two ranks under vLLM's own executor, which switch the plan off together."""
    chosen = settings(llama, {"plan": PLAN, "scores": scores}, **WHOLE_PROMPTS, tensor_parallel_size=2)
    asked = {"ask": prompts(LENGTHS), "log_probabilities": True}
    first, off, dense = run_job(tmp_path, {"settings": chosen, "steps": [asked, {"switch": False}, asked]}, TWO_RANKS)
    assert off["said"] == [{"on": False, "said": ""}] * 2
    for found, plan in ((first, PLAN), (dense, PLAN | {"keep_ratio": 1.0})):
        check([Answer(*answer) for answer in found["answers"]], expect(llama, plan, prompts(LENGTHS)))


# vLLM's own condition for an fp8 cache on a CPU.
WIDE = any(word in Path("/proc/cpuinfo").read_text() for word in ("avx512f", "amx_tile"))
FP8 = pytest.param("fp8", marks=pytest.mark.skipif(not WIDE, reason="vLLM's fp8 cache on a CPU needs AVX-512 or AMX"))


@pytest.mark.parametrize("cache", ["auto", FP8])
def test_bfloat16_runs(tmp_path: Path, llama: Path, cache: str) -> None:
    """Rounding flips tokens at the border of a selection, so results are near, not the same."""
    chosen = settings(llama, PLAN, **WHOLE_PROMPTS) | {"dtype": "bfloat16", "kv_cache_dtype": cache}
    found = answers(tmp_path, chosen, prompts(LENGTHS), {})
    wanted = expect(llama, PLAN, prompts(LENGTHS))
    pairs = [(a, b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f.prompt, w.prompt, strict=True)]
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < (0.1 if cache == "auto" else 0.3)


def test_server(llama_with_words: Path) -> None:
    """vLLM's OpenAI server, told of the plan by its arguments alone: a prompt, beams, an answer that is sent again, a
    dense prompt, the plan switched off and on.
    """
    folder, (asked,), port = llama_with_words, prompts([90]), 18411
    arguments = [word for word in server_arguments(folder, PLAN) if word != "--skip-tokenizer-init"]
    with running(*SERVER, *arguments, "--port", str(port), VLLM_SERVER_DEV_MODE="1") as server:
        wait_until_healthy(port, server)
        wanted = expect(folder, PLAN, [asked])[0].tokens
        assert complete(port, str(folder), asked) == wanted
        assert complete(port, str(folder), asked, use_beam_search=True) == wanted
        again = {"max_tokens": 2, "vllm_xargs": {"orthorank_prompt_tokens": len(asked)}}
        assert complete(port, str(folder), asked + wanted[:4], **again) == wanted[4:]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            complete(port, str(folder), asked, vllm_xargs={"orthorank_prompt_tokens": "many"})
        assert complete(port, str(folder), asked) == wanted
        dense = expect(folder, PLAN | {"keep_ratio": 1.0}, [asked])[0].tokens
        assert dense != wanted
        for said in (True, 1):
            assert complete(port, str(folder), asked, vllm_xargs={"orthorank_dense": said}) == dense
        for on, tokens in ((False, dense), (True, wanted)):
            rpc = post(port, "collective_rpc", {"method": "orthorank_switch", "args": [on]})
            assert rpc == {"results": [{"on": on, "said": ""}]}
            assert post(port, "reset_prefix_cache?reset_running_requests=true", {}) == {"success": True}
            assert complete(port, str(folder), asked) == tokens


def test_two_nodes(llama: Path) -> None:
    """Two nodes on this machine, one rank each, over TCP."""
    (asked,), port = prompts([90]), 18413
    nodes = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "29633"]
    arguments = [*server_arguments(llama, PLAN), *nodes, "--distributed-executor-backend", "mp", "--port", str(port)]
    second = ["-m", "tests.vllm.serve", *arguments, "--node-rank", "1", "--headless"]
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        running(*second, VLLM_CPU_OMP_THREADS_BIND="1", **loopback),
        running(
            *[*SERVER, *arguments, "--node-rank", "0"],
            VLLM_CPU_OMP_THREADS_BIND="0",
            **loopback,
        ) as first,
    ):
        wait_until_healthy(port, first)
        assert complete(port, str(llama), asked) == expect(llama, PLAN, [asked])[0].tokens
