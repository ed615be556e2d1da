"""vLLM's scheduler with two rules more: where chunks of a prompt end, and which blocks later requests may use.

Chunks end at multiples of a window, so that windows are never cut and what a window selects does not depend on what
else was in the batch. Blocks are put into the prefix cache only as far as a cold run would compute the same: not behind
the prompt, and not where tokens were forced or a window was not full. No further do blocks of others serve a request.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from orthorank.common.errors import OrthoRankError
from orthorank.serving.vllm.rules import chunk_tokens, params_of, prompt_tokens, same_tokens
from orthorank.serving.vllm.serving import Serving
from orthorank.serving.vllm_interface import interface


def make_scheduler(**kwargs: Any) -> Scheduler:
    """The scheduler for vLLM's settings: what ``scheduler_cls`` names."""
    interface.require(interface.SCHEDULER)
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (AsyncOrthoRankScheduler if asynchronous else OrthoRankScheduler)(**kwargs)


class _Rules(Scheduler):
    """The rules, over either scheduler."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        interface.expect(self, **interface.OBJECTS["scheduler"])
        serving = Serving.of(self.vllm_config.model_config.hf_config.orthorank)
        plan = serving.plan
        self._window, self._min_prompt = plan.select_window, plan.min_prompt
        if self._window is not None:
            self.need_mamba_block_aligned_split = True  # has `schedule` ask the method below
        if not self.cache_config.enable_prefix_caching or serving.reuse == "all":
            return
        interface.expect(self, **interface.OBJECTS["scheduler with a prefix cache"])
        interface.expect(self.kv_cache_manager, **interface.OBJECTS["kv_cache_manager"])
        if self._window is not None and self.hash_block_size % self._window:
            raise OrthoRankError(
                f"select_window is {self._window} and the cache's blocks have {self.hash_block_size} tokens: a hit "
                "could end inside a window; set --block-size to a multiple of the window, or pass "
                "--no-enable-prefix-caching"
            )
        manager, coordinator = self.kv_cache_manager, self.kv_cache_manager.coordinator
        cache_blocks, find, computed = (
            coordinator.cache_blocks,
            coordinator.find_longest_cache_hit,
            manager.get_computed_blocks,
        )
        longest = 0

        # What a vLLM gives besides is passed on: the number of arguments is not the same in all.
        def cache_same(request: Any, num_computed_tokens: int, *more: Any, **named: Any) -> None:
            cache_blocks(request, min(num_computed_tokens, same_tokens(request, plan)), *more, **named)

        def find_same(block_hashes: Any, max_cache_hit_length: int, *more: Any, **named: Any) -> Any:
            return find(block_hashes, min(max_cache_hit_length, longest), *more, **named)

        def computed_same(request: Any, *more: Any, **named: Any) -> Any:
            nonlocal longest
            longest = same_tokens(request, plan)
            return computed(request, *more, **named)

        coordinator.cache_blocks = cache_same
        coordinator.find_longest_cache_hit = find_same
        manager.get_computed_blocks = computed_same

    def _update_request_as_session(self, session: Any, *more: Any, **named: Any) -> None:
        """The next input of a streaming session: from now on vLLM counts what was generated as prompt."""
        session.orthorank_prompt = getattr(session, "orthorank_prompt", session.num_prompt_tokens)
        super()._update_request_as_session(session, *more, **named)

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """How many tokens the next chunk of ``request`` takes. vLLM's name for the question, from other models."""
        computed = num_new_local_computed_tokens + num_external_computed_tokens
        start = request.num_computed_tokens + computed
        assert self._window is not None  # only asked for where there is one
        prompt = prompt_tokens(request.num_prompt_tokens, params_of(request), self._min_prompt)
        return chunk_tokens(start, num_new_tokens, prompt, self._window)


class OrthoRankScheduler(_Rules):
    """With the rules."""


class AsyncOrthoRankScheduler(_Rules, AsyncScheduler):
    """With the rules, one step ahead."""
