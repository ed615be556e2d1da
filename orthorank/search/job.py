"""A search in progress: its folder, what it works on and what it found; resumable at every evaluation."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orthorank.common import format as words
from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError, difference, shown
from orthorank.common.files import check_free, read_json, user_path, writable_folder, write_json
from orthorank.common.progress import Screen
from orthorank.config import FILE_NAME, OrthoRankConfig
from orthorank.models import ModelInfo
from orthorank.search.calibration import Calibration
from orthorank.search.settings import SearchSettings
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.layers import LayerStack, config_fingerprint, model_fingerprint
from orthorank.stack.resources import Group, together
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SEARCH, STATE = "search.json", "search-state.json"
FORMAT = 1
NEWER = ("config_fingerprint",)  # which searches of earlier versions do not say
UNSAID = {"select": "topk"}  # what a search is that does not say so
FLOP_TOKENS = 2048  # prompt for which the FLOP bound is stated

S = TypeVar("S")


class Folder:
    """The output folder ``path``, with its files of the losses so far (``state``) and of the plan (``plan``).

    Nothing is touched before `claim`.
    """

    def __init__(self, path: Path) -> None:
        self.path = user_path("output", path)
        self.state, self.plan = self.path / STATE, self.path / FILE_NAME

    def claim(self, resume: bool) -> None:
        """Make the folder if it is not there; ``resume``: whether files of an earlier search may be in it.

        Raises:
            OrthoRankError: it cannot be written to, or it holds a search or a plan and ``resume`` is False.
        """
        if not resume:
            check_free(self.path, "go on with a search by adding --resume, or ")
        writable_folder(self.path)

    def open(self, identity: dict[str, Any]) -> bool:
        """Note what is searched, or check that the earlier search was the same.

        Returns:
            Whether there is a state to go on with.

        Raises:
            OrthoRankError: the folder holds another search; the message names the first difference.
        """
        for part in self.path.glob("*.[0-9]*.part"):  # what a killed process left behind
            part.unlink(missing_ok=True)
        before = self._identity()
        if before is None:
            if self.plan.exists():
                raise OrthoRankError(
                    f"{self.plan} is a plan without the search that made it, so there is nothing to resume; name "
                    "another folder with --output"
                )
            self.state.unlink(missing_ok=True)
            self.write(identity, None)
            return False
        before, now = UNSAID | before, UNSAID | json.loads(json.dumps(identity))
        for name in sorted({*before, *now} - ({*NEWER} - {*before})):
            if before.get(name) != now.get(name):
                raise OrthoRankError(
                    f"{self.path / SEARCH} is of another search: "
                    f"{difference(name, _short(before.get(name)), _short(now.get(name)))}; resume with the same "
                    "options, or name another folder with --output"
                )
        return self.state.exists()

    def write(self, identity: dict[str, Any], results: dict[str, Any] | None) -> None:
        """What is searched, and what came out; None: it is not finished."""
        write_json(self.path / SEARCH, {"format": FORMAT, "search": identity, "results": results})

    def _identity(self) -> dict[str, Any] | None:
        file = self.path / SEARCH
        try:
            value = read_json(file)
            format_, search = value["format"], value["search"]
            if type(format_) is not int or (format_ == FORMAT and not isinstance(search, dict)):
                raise ValueError("its fields are of other types")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OrthoRankError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise OrthoRankError(f"{file} is no record of a search; name another folder with --output") from error
        if format_ != FORMAT:  # what such a format may hold is not judged by this one
            raise OrthoRankError(
                f"{file} has format {shown(format_)} and this version reads {FORMAT}; go on with the version that "
                "wrote it, or name another folder with --output"
            )
        found: dict[str, Any] = search
        return found


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


@dataclass
class Job:
    """A search in progress.

    Args:
        folder: where its files are. model, info, stack: what it works on.
        calibration: the windows. sink_layer: l_sink, None where it was not asked for.
        candidates: layers that may be chosen, ascending. count: how many are.
        group: the processes that share the windows. began: on the clock of `time.perf_counter`.
    """

    settings: SearchSettings
    screen: Screen
    folder: Folder
    model: "PreTrainedModel"
    info: ModelInfo
    stack: LayerStack
    calibration: Calibration
    sink_layer: int | None
    candidates: list[int]
    count: int
    group: Group
    began: float

    @cached_property
    def evaluator(self) -> Evaluator:
        """The calibration loss. One for the whole job: its batch size, which decides the last bits, is set once."""
        settings, calibration = self.settings, self.calibration
        options: dict[str, Any] = {
            "keep_ratio": settings.keep_ratio,
            "criterion": settings.criterion,
            "options": settings.selection,
            "batch_size": settings.batch_size,
            "memory": None if settings.memory is None else int(settings.memory * 2**30),
            "processes": self.group,
        }
        if calibration.fit is not None:
            from orthorank.calibration.corrected_evaluator import CorrectedEvaluator

            options |= {"rank": settings.correct, "refit": not settings.fast}
            return CorrectedEvaluator(self.stack, calibration.windows, calibration.fit, **options)
        return Evaluator(self.stack, calibration.windows, **options)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the result, and so must not change between the parts of a resumed search."""
        settings = self.settings
        return {
            "version": __version__,
            "model": self.info.name,
            "model_fingerprint": model_fingerprint(self.model),
            "config_fingerprint": config_fingerprint(self.model),
            "dtype": self.info.dtype,
            "method": settings.method,
            "metric": (settings.metric or "ppl") if settings.method == "one-shot" else None,
            "fast": settings.fast,
            "keep_ratio": settings.keep_ratio,
            "criterion": settings.criterion,
            **code_of(settings.criterion),
            **settings.selection,
            **({} if settings.correct is None else {"correct": settings.correct}),
            "candidates": self.candidates,
            "layers": self.count,
            **self.calibration.to_dict(),
        }

    @cached_property
    def dense_loss(self) -> float:
        """The calibration loss of the dense model. Called on every process, once the batch size is set."""
        return self.evaluator.loss([])

    @property
    def flop_tokens(self) -> int:
        """The prompt's length for which FLOPs are stated."""
        return min(FLOP_TOKENS, self.info.max_tokens)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.group.rank == 0

    def saved_state(self, load: Callable[[str], S]) -> S | None:
        """What rank 0 loads from the folder, on every process; None: this is the beginning.

        Raises:
            OrthoRankError: it is of another search.
        """

        def open_folder() -> S | None:
            return load(str(self.folder.state)) if self.first and self.folder.open(self.identity) else None

        return self.group.share(together(self.group, open_folder))


@dataclass(frozen=True)
class Outcome:
    """What a method found.

    Args:
        order: the chosen layers in the order in which they were chosen.
        losses: of greedy: the plan's loss after each round. scores: of the others: every candidate's score.
        evaluations: losses that were measured. complete: False after an interruption.
        prefixes: of a search for a loss: what was measured of its path on held-out windows, fewest FLOPs first.
        rise: of these the plan's own figures.
    """

    order: list[int]
    losses: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    evaluations: int = 0
    complete: bool = True
    prefixes: list[dict[str, Any]] = field(default_factory=list)
    rise: dict[str, Any] | None = None


class NothingWithin(OrthoRankError):
    """No plan of a search is within its ``max_loss``. ``prefixes``: what was measured, as in `Outcome`."""

    def __init__(self, sentence: str, prefixes: list[dict[str, Any]]) -> None:
        super().__init__(sentence)
        self.prefixes = prefixes


def sink_layer_of(
    settings: SearchSettings, screen: Screen, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> int | None:
    """l_sink where the candidates depend on it, else None.

    Raises:
        OrthoRankError: the model has no sink.
    """
    if not settings.floored:
        return None
    if settings.sink_layer is not None:
        return settings.sink_layer
    from orthorank.stack.sink import detect_sink

    sink = detect_sink(model, tokenizer, bos=settings.bos)
    if sink.sink_layer is None:
        raise OrthoRankError(
            f"{sink.reason}. To search nevertheless, name the layer after which layers may be chosen with "
            "--sink-layer, or let all be candidates with --no-sink-floor"
        )
    screen.say(words.sink_sentence(sink.to_dict()))
    return sink.sink_layer


def plan_of(job: Job, outcome: Outcome, **calibration: Any) -> OrthoRankConfig:
    """The plan with the layers of ``outcome``; ``calibration`` is added to what it records of the search."""
    return OrthoRankConfig.for_model(
        job.model,
        layers=sorted(outcome.order),
        keep_ratio=job.settings.keep_ratio,
        criterion=job.settings.criterion,
        **job.settings.selection,
        sink_layer=job.sink_layer,
        calibration=job.calibration.to_dict()
        | {
            "bos": job.calibration.bos.policy,
            "method": f"{job.settings.title} among layers {words.layers(job.candidates)}",
            "order": outcome.order,
            "losses": outcome.losses,
            "complete": outcome.complete,
            "evaluations": outcome.evaluations,
            "batch_size": job.evaluator.batch_size,
            "dtype": job.info.dtype,
        }
        | ({} if job.settings.max_loss is None else {"max_loss": job.settings.max_loss})
        | ({"scores": {str(at): score for at, score in outcome.scores.items()}} if outcome.scores else {})
        | calibration,
    )
