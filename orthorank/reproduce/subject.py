"""The model under test: its texts, its plans, and measurements of it, each a cell."""

import hashlib
import json
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orthorank.calibration.halves import fit_maps
from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError
from orthorank.common.progress import Screen
from orthorank.common.texts import Text, check_ids, find_text, ids_sha256, tokenize
from orthorank.config import OrthoRankConfig, layer_count
from orthorank.evaluation.answer_cache import RECORDS
from orthorank.evaluation.perplexity import auto_batch_size, perplexity
from orthorank.hf.apply import apply
from orthorank.models import load_model, locate
from orthorank.reproduce.cells import Cells
from orthorank.reproduce.settings import ReproduceSettings
from orthorank.search.greedy import greedy_search
from orthorank.search.one_shot import loss_scores, rank_layers
from orthorank.search.settings import SearchSettings
from orthorank.search.state import SearchState
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.layers import LayerStack, config_fingerprint, model_fingerprint
from orthorank.stack.sink import detect_sink

KEEP_RATIO = 1 / 3
METHODS = ("greedy", "one-shot")


class Subject:
    """A loaded model with what is measured on it.

    Args:
        settings: what to measure. screen: is told what happens.

    Raises:
        OrthoRankError: the model or a text cannot be loaded, or a text is too short.
    """

    def __init__(self, settings: ReproduceSettings, screen: Screen) -> None:
        self.settings, self.screen = settings, screen
        self.texts = {name: _text(source) for name, source in settings.texts.items()}
        calibration = _text(settings.calibration, calibration=True)
        with screen.progress(f"loading {locate(settings.model).name}", 1):
            self.model, self.tokenizer, self.info = load_model(settings.model, settings.device, settings.dtype)
        self.calibration = self._windows(
            calibration, "calibration", settings.calibration_window, settings.calibration_windows
        )
        self.calibration_name = calibration.name
        self.windows = {
            name: self._windows(text, name, settings.window, settings.windows) for name, text in self.texts.items()
        }
        identity = {"model": model_fingerprint(self.model), "dtype": self.info.dtype, "torch": torch.__version__}
        if self.info.device != "cpu":  # figures of one kind of device, throughput above all, are not those of another
            identity["device"] = self.info.device.partition(":")[0]
        self.cells = Cells(settings.output / "cells", identity, config_fingerprint(self.model))
        self._corrected: dict[str, OrthoRankConfig] = {}

    @cached_property
    def stack(self) -> LayerStack:
        """The model layer by layer, for searches and analyses."""
        return LayerStack(self.model)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.info.num_hidden_layers

    @cached_property
    def sink(self) -> dict[str, Any]:
        """What `orthorank.stack.sink.detect_sink` reports, with a BOS where the tokenizer puts it, as in the paper."""
        return self.cells.get("sink", {}, lambda: detect_sink(self.model, self.tokenizer, bos="first").to_dict())

    @property
    def floor(self) -> int:
        """The lowest layer that may select: the one after the sink forms; without a sink, the second layer."""
        return 1 if self.sink["sink_layer"] is None else self.sink["sink_layer"] + 1

    def candidates(self, method: str, keep_ratio: float) -> list[int]:
        """Layers that a method may choose. Greedy: SLEB's own for removal, those after the sink for selection."""
        settings = SearchSettings(output=self.settings.output, method=method, keep_ratio=keep_ratio)
        return settings.candidates(self.num_layers, self.floor - 1 if settings.floored else None)

    def reaches(self, method: str, keep_ratio: float, sparsity: float) -> bool:
        """Whether a nominal sparsity is at least one layer and no more than all candidates."""
        return 1 <= layer_count(self.num_layers, sparsity, keep_ratio) <= len(self.candidates(method, keep_ratio))

    def order(self, method: str, keep_ratio: float, count: int) -> list[int]:
        """At least ``count`` layers in the order in which the method chooses them; its prefixes are the plans."""
        if method == "greedy":
            return self._greedy_order(keep_ratio, count)
        scores = {int(layer): score for layer, score in self._one_shot_scores(keep_ratio).items()}
        return rank_layers(scores, count)

    def plan(self, method: str, keep_ratio: float, sparsity: float, **fields: Any) -> OrthoRankConfig:
        """The plan of a method at a nominal sparsity; ``fields`` as for `OrthoRankConfig`.

        Raises:
            OrthoRankError: the sparsity is not one that `reaches`.
        """
        count = layer_count(self.num_layers, sparsity, keep_ratio)
        if not self.reaches(method, keep_ratio, sparsity):
            raise OrthoRankError(
                f"a sparsity of {sparsity:g} with keep ratio {keep_ratio:.3g} needs {count} layers; {method} may "
                f"choose 1 to {len(self.candidates(method, keep_ratio))}"
            )
        layers = self.order(method, keep_ratio, count)[:count]
        return OrthoRankConfig.for_model(self.model, layers=layers, keep_ratio=keep_ratio, keep_last=0, **fields)

    def corrected(self, plan: OrthoRankConfig | None, rank: int) -> OrthoRankConfig | None:
        """``plan`` with maps of ``rank`` fitted to the calibration windows; with rank 0, as it is."""
        if plan is None or rank == 0:
            return plan
        key = digest([measured_of(plan), rank])
        if key not in self._corrected:
            ids, half = self.calibration, self.calibration.shape[1] // 2
            if len(ids) == 1:  # some must be held out
                ids = ids[:, : 2 * half].view(2, half)
            self._corrected[key] = fit_maps(self.screen, "maps", self.model, ids, plan, rank=rank)
        return self._corrected[key]

    def perplexity(self, plan: OrthoRankConfig | None, text: str, rank: int = 0) -> dict[str, Any]:
        """Perplexity of the model with ``plan`` (None: dense) on one of the held-out texts.

        Args:
            rank: of the maps it gets; 0: none.
        """
        windows = self.windows[text]

        def measure() -> dict[str, Any]:
            followed = self.corrected(plan, rank)
            with (
                nullcontext() if followed is None else apply(self.model, followed),
                self.screen.progress(f"perplexity on {text}", len(windows)) as advance,
            ):
                result = perplexity(
                    self.model,
                    windows,
                    batch_size=auto_batch_size(self.model, windows.shape[1]),
                    on_window=lambda done, total, so_far: advance(done, f"{so_far:.2f}"),
                )
            return result.to_dict() | {"standard_error": result.standard_error}

        inputs = {"plan": measured_of(plan), "text": text, "ids": ids_hash(windows)} | self.fitted(rank)
        return self.cells.get(f"perplexity/{text}-{digest(inputs)}", inputs, measure)

    def fitted(self, rank: int) -> dict[str, Any]:
        """What a cell depends on beside its plan, where that gets maps of ``rank``."""
        return {"rank": rank, "fitted_to": ids_hash(self.calibration)} if rank else {}

    def evaluator(self, keep_ratio: float, **options: Any) -> Evaluator:
        """The calibration loss."""
        return Evaluator(self.stack, self.calibration, keep_ratio=keep_ratio, **options)

    def _greedy_order(self, keep_ratio: float, count: int) -> list[int]:
        """One greedy run per keep ratio, as long as has been asked for; a longer one continues it."""
        candidates, evaluator = self.candidates("greedy", keep_ratio), self.evaluator(keep_ratio, batch_size=1)
        path = self.cells.folder / f"greedy-{keep_ratio:.4f}-{self.cells.key({'ids': ids_hash(self.calibration)})}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = SearchState.load(path) if path.exists() else None
        if state is not None and len(state.chosen) >= count:
            return state.chosen
        if state is not None:
            state.rounds = max(count, state.rounds)
        with self.screen.progress(f"greedy search, keep ratio {keep_ratio:.3g}", count) as advance:
            state = greedy_search(
                evaluator,
                candidates,
                count if state is None else state.rounds,
                state=state,
                on_evaluation=lambda at, layer, loss, best, done, total: advance(at, f"{done} of {total}: {best:.3f}"),
                save_to=path,
            )
        return state.chosen

    def _one_shot_scores(self, keep_ratio: float) -> dict[str, float]:
        inputs = {"keep_ratio": keep_ratio, "ids": ids_hash(self.calibration)}

        def measure() -> dict[str, float]:
            candidates = self.candidates("one-shot", keep_ratio)
            with self.screen.progress(f"one-shot scores, keep ratio {keep_ratio:.3g}", len(candidates)) as advance:
                state = loss_scores(
                    self.evaluator(keep_ratio, batch_size=1),
                    candidates,
                    on_score=lambda layer, loss, done, total: advance(done, f"layer {layer}: {loss:.3f}"),
                )
            return {str(layer): score for layer, score in state.finite.items()}

        return self.cells.get(f"one-shot-{keep_ratio:.4f}", inputs, measure)

    def _windows(self, text: Text, name: str, window: int, windows: int | None) -> Tensor:
        ids = tokenize(text, self.tokenizer)
        check_ids(ids, self.model)
        count = min(len(ids) // window, windows or len(ids))
        if count < 1 or (windows is not None and count < windows and name == "calibration"):
            raise OrthoRankError(
                f"{name} ({text.name}) has {len(ids):,} tokens, fewer than {windows or 1} windows of {window}; name a "
                "longer text or fewer or shorter windows"
            )
        return ids[: count * window].view(count, window).to(self.model.device)


def plan_key(plan: OrthoRankConfig | None) -> dict[str, Any] | None:
    """What measurements of a plan depend on: its fields without what they say of where it came from."""
    if plan is None:
        return None
    key = {name: value for name, value in plan.to_dict().items() if name not in RECORDS}
    for name, value in (("keep_multiple", 1), ("min_prompt", 0)):  # which there were not when figures were kept first
        if key[name] == value:
            del key[name]
    return key


def measured_of(plan: OrthoRankConfig | None) -> dict[str, Any] | None:
    """`plan_key` for a cell's inputs: with what tells an edited criterion of one's own from what it was."""
    return None if plan is None else (plan_key(plan) or {}) | code_of(plan.criterion)


def digest(inputs: Any) -> str:
    """A short name for ``inputs``.

    >>> digest({"a": 1}) == digest({"a": 1}) != digest({"a": 2})
    True
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]


def ids_hash(ids: Tensor) -> str:
    """A short hash of token ids."""
    return ids_sha256(ids)[:16]


def _text(source: str, calibration: bool = False) -> Text:
    """A file or a dataset, by its name; of a dataset the calibration text is from its training split."""
    from orthorank.common.datasets import RECIPES, dataset_texts, evaluation_text

    if source.partition(":")[0] not in RECIPES:
        return find_text(source)
    return dataset_texts(source)[0] if calibration else evaluation_text(dataset=source)
