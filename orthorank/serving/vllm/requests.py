"""What the metadata of a step does not say of its requests: how long the prompts are, and what they begin with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from orthorank.serving.vllm import hooks
from orthorank.serving.vllm.rules import params_of, prompt_tokens
from orthorank.serving.vllm_interface.interface import OBJECTS, expect, served_dense


class RequestTable:
    """Prompt lengths and first tokens of the requests in flight.

    vLLM has two model runners. The second tells the model of every new request (`add`), and the metadata of a step name
    its rows. The first keeps both itself: its input batch is read while it builds metadata.

    Args:
        size: the most requests in flight.
    """

    def __init__(self, size: int) -> None:
        self._prompts = np.zeros(size, dtype=np.int64)
        self._first = np.zeros(size, dtype=np.int64)

    def add(self, row: int, prompt: Sequence[int] | None, params: Any = None) -> None:
        """A new request in ``row``, with its parameters; no prompt: nothing of it is selected from."""
        self._prompts[row] = prompt_tokens(len(prompt), params) if prompt else 0
        self._first[row] = prompt[0] if prompt else 0

    def rows(self, common: Any) -> tuple[list[int], list[int]]:
        """Prompt lengths and first tokens of the rows of ``common``, a step's metadata. 0 for rows of no request.

        The length of a prompt that every layer computes is negative: see `rules.prompt_tokens`.

        Raises:
            OrthoRankError: there are prompts in it, of a model runner that did not announce them.
        """
        count = common.num_reqs
        if common.req_idx is not None:
            rows = common.req_idx[:count]
            return self._prompts[rows].tolist(), self._first[rows].tolist()
        runner = hooks.runner()
        if runner is None:  # metadata that no runner asked for
            if common.is_prefilling is not None and bool(common.is_prefilling[:count].any()):
                raise served_dense(
                    "a model runner of vLLM that is neither of the two this package knows has prompts in this step, "
                    "whose lengths it does not tell"
                )
            return [0] * count, [0] * count
        expect(runner, **OBJECTS["runner"])
        batch, requests = runner.input_batch, runner.requests
        expect(batch, **OBJECTS["batch"])
        known = min(count, batch.num_reqs)  # rows behind are padding
        prompts = [
            prompt_tokens(tokens, params_of(requests[request]))
            for request, tokens in zip(batch.req_ids[:known], batch.num_prompt_tokens[:known].tolist(), strict=True)
        ]
        return prompts + [0] * (count - known), batch.token_ids_cpu[:count, 0].tolist()
