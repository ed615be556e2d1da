"""Engines, what they answer, and what the Hugging Face path of this package answers."""

import copy
import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orthorank.serving.vllm.hooks import ARCHITECTURES

PLAN: dict[str, Any] = {"layers": [1, 2], "keep_ratio": 1 / 3}
WINDOW = PLAN | {"select": "window", "select_window": 32}
WHOLE_PROMPTS = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
EQUAL = 1e-4  # in log-probability, float32


class Answer(NamedTuple):
    """The tokens after a prompt; log-probabilities of these, and of each prompt token but the first."""

    tokens: list[int]
    written: list[float]
    prompt: list[float]

    def distance(self, other: "Answer") -> float:
        """The largest difference of two log-probabilities; those of the prompt where both have them."""
        pairs = list(zip(self.written, other.written, strict=True))
        if self.prompt and other.prompt:
            pairs += zip(self.prompt, other.prompt, strict=True)
        return max(abs(a - b) for a, b in pairs)


def prompts(lengths: list[int], seed: int = 0, first: int = 1) -> list[list[int]]:
    """Random prompts that begin with the same token."""
    draw = random.Random(seed)
    return [[first] + [draw.randrange(3, 512) for _ in range(length - 1)] for length in lengths]


def settings(folder: Path, plan: Any = None, **others: Any) -> dict[str, Any]:
    """Arguments of an engine; ``plan`` as in the configuration's key ``orthorank``, None: vLLM as it is."""
    import json

    chosen: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
    }
    if plan is not None:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        chosen["hf_overrides"] = {"architectures": [ARCHITECTURES[model_type]], "orthorank": plan}
    return chosen | others


@contextmanager
def engine(folder: Path, plan: Any = None, **others: Any) -> Iterator[Any]:
    """An engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**settings(folder, plan, **others))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm: Any, asked: list[list[int]], tokens: int = 6, log_probabilities: bool = True) -> list[Answer]:
    """Greedy answers, all prompts at once. vLLM leaves the prefix cache out where a prompt's are asked for."""
    return [answer_of(output) for output in outputs(llm, asked, tokens, log_probabilities)]


def greedy_params(tokens: int, *, log_probabilities: bool = False, **more: Any) -> Any:
    """So many tokens, the likeliest ones; ``more``: further sampling parameters."""
    from vllm import SamplingParams

    params = {
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,
        "prompt_logprobs": 0 if log_probabilities else None,
    }
    return SamplingParams(**(params | more))


def outputs(llm: Any, asked: list[list[int]], tokens: int, log_probabilities: bool, **more: Any) -> list[Any]:
    """What vLLM gives for them; ``more``: as for `greedy_params`."""
    params = greedy_params(tokens, log_probabilities=log_probabilities, **more)
    given: list[Any] = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    return given


def converse(llm: Any, inputs: list[list[int]], tokens: int) -> list[Answer]:
    """A streaming-input session, as vLLM's asynchronous front end leads it: each input, and so many tokens after it."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    front = llm.llm_engine
    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, output_kind=RequestOutputKind.DELTA
    )
    identity: str | None = None

    def send(ids: list[int], *, resumable: bool) -> None:
        nonlocal identity
        tasks = front.get_supported_tasks()
        request = front.input_processor.process_inputs(
            identity or "session", tokens_input(list(ids)), params, supported_tasks=tasks, resumable=resumable
        )
        if identity is None:
            front.input_processor.assign_request_id(request)
            identity = request.request_id
        else:
            request.external_req_id = "session"
        front.output_processor.add_request(request, None, None, 0)
        front.engine_core.add_request(copy.deepcopy(request))  # which goes to another process there

    turns = []
    for ids in inputs:
        send(ids, resumable=True)
        written: list[int] = []
        scores: list[float] = []
        for _ in range(100 + tokens):
            if len(written) == tokens:
                break
            for output in front.step():
                new = output.outputs[0]
                written += new.token_ids
                scores += [found[token].logprob for token, found in zip(new.token_ids, new.logprobs, strict=True)]
        turns.append(Answer(written, scores, []))
    send([0], resumable=False)
    while front.has_unfinished_requests():
        front.step()
    return turns


def answer_of(output: Any, number: int = 0) -> Answer:
    """What an engine gave for one prompt; ``number``: of its answers."""
    found = output.prompt_logprobs or []
    prompt = [found[at][token].logprob for at, token in enumerate(output.prompt_token_ids) if at and found]
    written = output.outputs[number]
    scores = [each[token].logprob for token, each in zip(written.token_ids, written.logprobs, strict=True)]
    return Answer(list(written.token_ids), scores, prompt)


def corrected(folder: Path, plan: dict[str, Any], layers: list[int], hidden: int = 128, **saved: Any) -> Path:
    """``folder`` with the plan and random maps for ``layers``; `served` and `expect` take it."""
    import torch

    from orthorank import OrthoRankConfig
    from orthorank.correction import Correction, LayerMap

    rank, draw = 8, torch.Generator().manual_seed(0)
    shapes = ((rank, hidden), 0.1), ((hidden, rank), 0.2), ((hidden,), 0.2)
    maps = {i: LayerMap(*(scale * torch.randn(shape, generator=draw) for shape, scale in shapes)) for i in layers}
    OrthoRankConfig(**plan, correction=Correction(maps)).save_pretrained(folder, **saved)
    return folder


def served(plan: Path, **options: Any) -> dict[str, Any]:
    """What ``orthorank vllm-args`` prints of the plan in that folder."""
    from orthorank import OrthoRankConfig
    from orthorank.serving.vllm.serving import Serving

    return Serving(OrthoRankConfig.from_pretrained(plan), **options).to_dict()


def expect(folder: Path, plan: Any, asked: list[list[int]], tokens: int = 6) -> list[Answer]:
    """The same from transformers with this package's `apply`, one prompt after another."""
    import torch
    from transformers import AutoModelForCausalLM

    from orthorank import OrthoRankConfig, apply

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    handle = apply(model, plan if isinstance(plan, Path) else OrthoRankConfig(**plan))
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        chosen = written.sequences[0, len(prompt) :].tolist()
        scores = [
            each[0].float().log_softmax(-1)[token].item() for token, each in zip(chosen, written.scores, strict=True)
        ]
        with torch.no_grad(), handle.prefilling():
            found = model(ids).logits[0].float().log_softmax(-1)
        scored = [found[at - 1, token].item() for at, token in enumerate(prompt) if at]
        answers.append(Answer(chosen, scores, scored))
    return answers


def check(found: list[Answer], wanted: list[Answer], within: float = EQUAL) -> None:
    """Same tokens, and log-probabilities within that."""
    distances = [a.distance(b) for a, b in zip(found, wanted, strict=True)]
    assert max(distances) < within, distances
    assert [a.tokens for a in found] == [b.tokens for b in wanted]


def unlike(found: list[Answer], wanted: list[Answer]) -> None:
    """At least one prompt is far away: the comparison above could fail."""
    assert max(a.distance(b) for a, b in zip(found, wanted, strict=True)) > 0.1
