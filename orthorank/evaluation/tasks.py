"""Zero-shot and other tasks through lm-evaluation-harness, with a plan applied (paper, section 4.1).

The harness pads a batch on the right and passes no attention mask. A dense causal model does not care; with a plan the
pads would be ranked among the tokens, so that an answer's likelihood would depend on what it shares a batch with. This
adapter passes the true lengths. Importing this module registers it as the model ``orthorank``:

    orthorank lm-eval run --model orthorank --model_args pretrained=...,plan=my-plan --tasks piqa
"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from orthorank.calls.context import ForwardContext
from orthorank.common.errors import OrthoRankError, type_of
from orthorank.common.loading import Complete
from orthorank.config import OrthoRankConfig
from orthorank.evaluation import answer_cache
from orthorank.hf.apply import Handle, apply
from orthorank.hf.apply import context as prompts_of
from orthorank_kernels.remedies import install

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise OrthoRankError(f"evaluating tasks needs lm-evaluation-harness ({error}); run: {install('eval')}") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[Any, list[int], list[int]]  # what identifies a request, its context and its continuation in tokens


class LastTokens:
    """Counts how often a layer updated the last token of a row: the one whose state predicts what comes next.

    Rows below the plan's ``min_prompt`` do not count: layers hear of them only where a longer one shares their batch.
    """

    def __init__(self) -> None:
        self._rows: list[int | Tensor] = []
        self._selected: list[Tensor] = []

    def __call__(self, layer: int, positions: Tensor, call: ForwardContext) -> None:
        """What `Handle.watching` calls: ``positions`` int32 ``[batch, selected]``, -1 past a row's count."""
        last: Any = call.tokens - 1
        if call.starts is not None and call.lengths is not None:
            last = (call.starts + call.lengths - 1)[:, None]
        updated = (positions == last).any(dim=1)
        if call.left_out is None:
            self._rows.append(len(updated))
        else:
            selects = call.ranked_mask(positions.device).any(dim=1)
            updated = updated & selects
            self._rows.append(selects.sum())
        self._selected.append(updated.sum())

    @property
    def share(self) -> float | None:
        """Of all rows in all layers that select from them; None before the first."""
        rows = sum(map(int, self._rows))
        return sum(map(int, self._selected)) / rows if rows else None


@register_model("orthorank")
class OrthoRankLM(HFLM):
    """A Hugging Face causal model with a plan applied, for lm-evaluation-harness.

    Args:
        pretrained: as for the harness's own ``hf`` model: hub id, folder, or a model that is loaded already.
        plan: a plan, or the path of one; None: the dense model, with the results of ``hf``.
        context_only: the selected layers choose among the tokens of the context, and the tokens of the answer are
            dense, so that a candidate answer does not change how its context is computed. False is what the paper
            does: selection over context and answer.
        further: as for ``hf``: batch_size, device, dtype, max_length, ...

    Raises:
        OrthoRankError: the plan cannot be read, does not fit the model, or the model is no causal one; its checkpoint
            lacks tensors.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: "OrthoRankConfig | str | Path | None" = None,
        context_only: bool | str = False,
        **further: Any,
    ) -> None:
        plan = _read(plan)  # before the model is loaded: this can fail at once
        super().__init__(pretrained=pretrained, **further)
        if self.backend != "causal":
            raise OrthoRankError(
                f"the model has the backend {self.backend!r}; OrthoRank needs a causal (decoder) model"
            )
        if self.prefix_token_id is None:
            raise OrthoRankError(
                "the tokenizer has neither a BOS nor an EOS token, which the harness puts before a request without a "
                "context; pass prefix_token_id, the id of the token to use"
            )
        self.context_only = context_only in (True, "True", "true", "1")
        self.handle: Handle | None = None if plan is None else apply(self.model, plan)
        self.last_tokens = LastTokens()

    def _create_model(self, pretrained: Any, *args: Any, **kwargs: Any) -> None:
        """As the harness's own; a checkpoint without all of the model's tensors is refused."""
        loader: Any = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS: Any = Complete(loader)
        try:
            super()._create_model(pretrained, *args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = loader

    def set_cache_hook(self, cache_hook: Any) -> None:
        """What the harness calls with its cache of answers; see `orthorank.evaluation.answer_cache`.

        Raises:
            OrthoRankError: the answers in it are of another model or plan.
        """
        if (answers := getattr(cache_hook, "dbdict", None)) is not None:
            plan = None if self.handle is None else self.handle.config
            further = {"max_length": self.max_length, "add_bos_token": self.add_bos_token}
            further["tokenizer"] = answer_cache.tokenizer_fingerprint(self.tokenizer)
            owner = answer_cache.owner_of(self.model, plan, self.context_only, further)
            answer_cache.claim(answers, owner, str(getattr(answers, "filename", "given")))
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness's own; raises when a layer of the plan was never active."""
        answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self.check_active()
        return answers

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """As the harness's own; raises when a layer of the plan was never active."""
        texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self.check_active()
        return texts

    def check_active(self) -> None:
        """Every layer of the plan has run.

        Raises:
            OrthoRankError: one has not: the scores would be the dense model's under another name.
        """
        if self.handle is None:
            return
        if idle := [layer for layer, counts in self.handle.stats.items() if counts.calls == 0]:
            raise OrthoRankError(
                f"layer {idle[0]} of the plan was never active, so these scores are not the plan's; was the plan "
                "removed from the model, or the model replaced?"
            )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would give.

        Requests with the same input (answers of one token to one question) share a forward.
        """
        from tqdm import tqdm

        inputs: dict[tuple[int, ...], list[int]] = {}
        for number, (_key, context, continuation) in enumerate(requests):
            inputs.setdefault(self._input_of(context, continuation), []).append(number)
        ordered = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))  # the longest first: memory fails early
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        size = override_bs or self._size_of_batches(requests)
        for begin in range(0, len(ordered), size):
            batch = ordered[begin : begin + size]
            contexts = [self._context_length(requests[inputs[tokens][0]], len(tokens)) for tokens in batch]
            logits = self._padded_call(batch, contexts)
            for row, tokens in enumerate(batch):
                for number in inputs[tokens]:
                    answers[number] = _score(logits[row, : len(tokens)], requests[number][2], self.softmax_dtype)
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                bar.update(len(inputs[tokens]))
        bar.close()
        return answers

    def _input_of(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """All tokens but the last, which predicts nothing; cut on the left to what the model takes."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise OrthoRankError(
                f"a request has {len(context)} tokens of context and {len(continuation)} of continuation; it needs at "
                f"least one of each and at most {self.max_length} of continuation"
            )
        return tuple((context + continuation)[-(self.max_length + 1) :][:-1])

    @staticmethod
    def _context_length(request: Pair, tokens: int) -> int:
        """Tokens of the input that are context, whatever was cut off; the first one always is."""
        return max(1, tokens - len(request[2]) + 1)

    def _size_of_batches(self, requests: list[Pair]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = max(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        return int(self._detect_batch_size(requests, longest))

    def _padded_call(self, batch: list[tuple[int, ...]], contexts: list[int]) -> Tensor:
        """Logits ``[rows, tokens, vocabulary]`` of rows padded on the right, with a mask that says so."""
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        # A full mask and none are the same to a model, and the second costs nothing.
        padded = None if bool(mask.all()) else mask.to(self.device)
        with ExitStack() as around:
            around.enter_context(
                torch.autocast(
                    device_type=self.device.type,
                    dtype=self.mixed_precision_dtype,
                    enabled=self.mixed_precision_dtype is not None,
                )
            )
            if self.handle is not None:
                around.enter_context(self.handle.watching(self.last_tokens))
                if self.context_only:
                    around.enter_context(prompts_of(self.model, contexts, keep_last=0))  # as plain calls have it
            return self.model(ids.to(self.device), attention_mask=padded).logits


def _score(logits: Tensor, continuation: list[int], dtype: Any) -> tuple[float, bool]:
    """The log-probability of ``continuation`` at the end of ``logits [tokens, vocabulary]``, and if it is greedy."""
    last = log_softmax(logits[-len(continuation) :], dim=-1, dtype=dtype)
    wanted = torch.tensor(continuation, device=last.device)
    greedy = bool((last.argmax(dim=-1) == wanted).all())
    return float(last.gather(1, wanted[:, None]).sum()), greedy


def _read(plan: Any) -> OrthoRankConfig | None:
    if plan is None or isinstance(plan, OrthoRankConfig):
        return plan
    if not isinstance(plan, (str, Path)):
        raise OrthoRankError(f"plan is {type_of(plan)}; it must be a plan or the path of one")
    return OrthoRankConfig.from_pretrained(plan)
