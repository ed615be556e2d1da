"""``orthorank search`` without its terminal: from the settings to a plan in a folder, resumable at every evaluation."""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common import format as words
from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError, difference, shown
from orthorank.common.files import check_free, read_json, user_path, writable_folder, write_json
from orthorank.common.progress import Screen
from orthorank.config import FILE_NAME, OrthoRankConfig
from orthorank.models import ModelInfo, load_model, locate, pick_device, pick_dtype
from orthorank.search.calibration import Calibration, cut_windows, find_source
from orthorank.search.settings import SearchSettings, candidates_of, count_of
from orthorank.stack.layers import config_fingerprint, model_fingerprint
from orthorank.stack.resources import Group, local_device
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthorank.stack.evaluator import Evaluator
    from orthorank.stack.layers import LayerStack


SEARCH, STATE = "search.json", "search-state.json"
FORMAT = 1
NEWER = ("config_fingerprint",)  # which searches of earlier versions do not say
FLOP_TOKENS = 2048  # prompt for which the FLOP bound is stated


class Folder:
    """The output folder.

    Args:
        path: where it is. Nothing is touched before `claim`.
    """

    def __init__(self, path: Path) -> None:
        self.path = user_path("output", path)

    @property
    def state(self) -> Path:
        """The file with the losses so far."""
        return self.path / STATE

    @property
    def plan(self) -> Path:
        """The plan's file."""
        return self.path / FILE_NAME

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
        now = json.loads(json.dumps(identity))
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
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OrthoRankError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise OrthoRankError(f"{file} is no record of a search; name another folder with --output") from error
        if type(format_) is int and format_ != FORMAT:  # before what such a format may hold is judged by this one
            raise OrthoRankError(
                f"{file} has format {shown(format_)} and this version reads {FORMAT}; go on with the version that "
                "wrote it, or name another folder with --output"
            )
        if type(format_) is not int or not isinstance(search, dict):
            raise OrthoRankError(f"{file} is no record of a search; name another folder with --output")
        return search


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
        identity: what a continued search must have in common.
    """

    settings: SearchSettings
    screen: Screen
    folder: Folder
    model: "PreTrainedModel"
    info: ModelInfo
    stack: "LayerStack"
    calibration: Calibration
    sink_layer: int | None
    candidates: list[int]
    count: int
    group: Group
    began: float
    identity: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def evaluator(self) -> "Evaluator":
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
        from orthorank.stack.evaluator import Evaluator

        return Evaluator(self.stack, calibration.windows, **options)

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


def prepare(settings: SearchSettings, screen: Screen, group: Group) -> Job:
    """What every search needs. What can go wrong early goes wrong here, the cheap things first."""
    from orthorank.stack.layers import LayerStack

    began = time.perf_counter()
    where, device = locate(settings.model), local_device(settings.device)
    pick_dtype(settings.dtype, pick_device(device))
    if settings.device_map is not None and group.size > 1:
        raise OrthoRankError(
            "device_map spreads the model of one process over the devices, and here are several processes; leave out "
            "--device-map, or start one process"
        )
    folder = Folder(settings.output)
    if group.rank == 0:
        folder.claim(settings.resume)
    with screen.progress("fetching the dataset", 1) if settings.dataset else nullcontext():
        source = find_source(settings)
    screen.heading(f"Search on {where.name}: {settings.title}")
    with screen.progress("loading the model", 1):
        model, tokenizer, info = load_model(settings.model, device, settings.dtype, device_map=settings.device_map)
    calibration = cut_windows(settings, source, model, tokenizer, info.max_tokens)
    shape = f"{info.num_hidden_layers} layers, {info.parameters / 1e6:,.0f} M weights, {info.dtype} on {info.device}"
    screen.say(shape if group.size == 1 else f"{shape}; {group.size} processes")
    screen.say(f"calibration: {_windows_in_words(calibration)}; {calibration.bos}")
    sink_layer = _sink_layer(settings, screen, model, tokenizer)
    return Job(
        settings=settings,
        screen=screen,
        folder=folder,
        model=model,
        info=info,
        stack=LayerStack(model),
        calibration=calibration,
        sink_layer=sink_layer,
        candidates=candidates_of(settings, info.num_hidden_layers, sink_layer),
        count=0,
        group=group,
        began=began,
    )


def aim(job: Job) -> None:
    """Settle how many of the candidates are chosen, and with what a continued search is compared.

    Raises:
        OrthoRankError: there are not as many candidates.
    """
    settings = job.settings
    held_out = job.calibration.held_out
    if settings.max_loss is not None and (held_out is None or len(held_out) < 2):
        raise OrthoRankError(
            f"max_loss is judged on held-out windows, 2 or more, and here are {0 if held_out is None else 1}; give a "
            "longer text or more --windows"
        )
    job.count = count_of(settings, job.info.num_hidden_layers, job.candidates)
    job.identity = identity_of(job)
    ratio = words.ratio(settings.keep_ratio)
    action = "remove" if settings.keep_ratio == 0 else f"update {ratio} of the tokens in"
    most = "at most " if settings.open_ended else ""
    job.screen.say(words.capital(f"{action} {most}{job.count} of the layers {words.layers(job.candidates)}."))


def _windows_in_words(calibration: Calibration) -> str:
    count, length = calibration.windows.shape
    beside = "" if calibration.fit is None else f", maps fitted on {len(calibration.fit)} others"
    return f"{count} windows of {length} tokens{beside}; {calibration.text.name}"


def _sink_layer(
    settings: SearchSettings, screen: Screen, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> int | None:
    """l_sink where the candidates depend on it."""
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


def check_agreement(job: Job) -> None:
    """All processes found the same model, text and candidates."""
    identities = job.group.collect(job.identity)
    for rank, other in enumerate(identities):
        if wrong := [name for name in other if other[name] != identities[0][name]]:
            raise OrthoRankError(
                f"process {rank} has another {wrong[0]} than process 0; give all of them the same model and text"
            )


def identity_of(job: Job) -> dict[str, Any]:
    """What decides the result, and so must not change between the parts of a resumed search."""
    settings = job.settings
    return {
        "version": __version__,
        "model": job.info.name,
        "model_fingerprint": model_fingerprint(job.model),
        "config_fingerprint": config_fingerprint(job.model),
        "dtype": job.info.dtype,
        "method": settings.method,
        "metric": (settings.metric or "ppl") if settings.method == "one-shot" else None,
        "fast": settings.fast,
        "keep_ratio": settings.keep_ratio,
        "criterion": settings.criterion,
        **code_of(settings.criterion),
        **settings.selection,
        **({} if settings.correct is None else {"correct": settings.correct}),
        "candidates": job.candidates,
        "layers": job.count,
        **job.calibration.to_dict(),
    }


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
