"""What a server is told: the plan, and how to run it there."""

import warnings
from dataclasses import dataclass, fields
from typing import Any

from orthorank.common.errors import OrthoRankError, UnknownKeysWarning
from orthorank.config import OrthoRankConfig
from orthorank.serving.vllm import maps

OPTIONS: dict[str, tuple[str, ...]] = {
    "threshold_count": ("read", "capacity"),
    "reuse": ("prompt", "all"),
    "attention": ("auto", "paged", "portable"),
    "scores": ("own", "first rank"),
}
HOW = """pass --hf-overrides '{"architectures": [...], "orthorank": ...}', as `orthorank vllm-args PLAN` prints it"""


@dataclass(frozen=True)
class Serving:
    """The key ``orthorank`` of a served model's configuration.

    Args:
        plan: the plan, the same file as for Hugging Face's models.
        threshold_count: of ``select="threshold"``. ``"read"``: each layer reads on the host how many tokens it
            selected, and computes only these. ``"capacity"``: the host waits for nothing, and matrix products have
            room for all tokens of the step.
        reuse: which blocks of the prefix cache later requests may use. ``"prompt"``: those of prompt tokens that every
            cold run would compute the same; ``"all"``: also those of generated tokens, of a prompt's forced last tokens
            and of its last, partial window.
        attention: ``"paged"``: this package's kernel over vLLM's cache; ``"portable"``: the backend's own kernel,
            each selected query as a request of its own; ``"auto"``: the first where the cache's layout is known.
        scores: ``"own"``: every rank of a tensor-parallel group selects by its own scores; ``"first rank"``: by those
            of the first one, where ranks are different machines whose results may differ in the last bit.

    Raises:
        OrthoRankError: an option has an illegal value.

    Example:
        >>> Serving(OrthoRankConfig(layers=[1], keep_ratio=0.5), reuse="none")
        Traceback (most recent call last):
        orthorank.common.errors.OrthoRankError: reuse is 'none'; it may be 'prompt' or 'all'
    """

    plan: OrthoRankConfig
    threshold_count: str = "read"
    reuse: str = "prompt"
    attention: str = "auto"
    scores: str = "own"

    def __post_init__(self) -> None:
        for name, legal in OPTIONS.items():
            if getattr(self, name) not in legal:
                raise OrthoRankError(f"{name} is {getattr(self, name)!r}; it may be {' or '.join(map(repr, legal))}")

    @classmethod
    def of(cls, value: object) -> "Serving":
        """What the key ``orthorank`` says: a plan, the path of one, or ``{"plan": either, option: ...}``.

        Example:
            >>> Serving.of({"plan": {"layers": [2], "keep_ratio": 0.5}, "reuse": "all"}).reuse
            'all'
        """
        if isinstance(value, dict) and "plan" in value:
            options = {name: given for name, given in value.items() if name != "plan"}
            if unknown := sorted(set(options) - set(OPTIONS)):
                raise OrthoRankError(
                    f"orthorank has the key {unknown[0]!r}; beside the plan it may have {list(OPTIONS)}"
                )
            return cls(_plan(value["plan"]), **options)
        return cls(_plan(value))

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes: the plan without what it says of where it came from, but with where its maps are.

        Raises:
            OrthoRankError: it has maps that are in no file.
        """
        about = ("calibration", "measured")
        plan = {name: value for name, value in self.plan.to_dict().items() if name not in about}
        if self.plan.correction is not None:
            plan["correction"] |= {maps.WHERE: maps.where_of(self.plan)}
        said = {name: getattr(self, name) for name, (default, *_) in OPTIONS.items() if getattr(self, name) != default}
        return {"plan": plan, **said}


def _plan(value: object) -> OrthoRankConfig:
    """Keys that a plan does not have are refused here: a warning in a server's log is not read.

    The other warnings stay what they are: that a newer version wrote the plan; that it has no layers, which `checks`
    refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownKeysWarning)
        try:
            if isinstance(value, str):
                return OrthoRankConfig.from_pretrained(value)
            if isinstance(value, dict):
                corrected = value.get("correction") is not None
                return maps.with_maps(value) if corrected else OrthoRankConfig.from_dict(value)
        except UnknownKeysWarning as warning:
            known = ", ".join(field.name for field in fields(OrthoRankConfig))
            raise OrthoRankError(
                f"{warning}. A server ignores none: correct them or take them out; known are {known}"
            ) from None
    raise OrthoRankError(f"the model's configuration has orthorank = {value!r}; it must be a plan or its path: {HOW}")
