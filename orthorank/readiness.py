"""What a plan may say and this version cannot do yet: refused, so that no plan is followed in part."""

from orthorank.config import OrthoRankConfig
from orthorank.errors import OrthoRankError

# Legal values of a plan's fields without an implementation. Whoever implements one takes it out.
UNREADY: dict[str, tuple[object, ...]] = {
    "select": ("window", "threshold"),
    "decode": ("threshold",),
}


def refuse_unready(config: OrthoRankConfig) -> None:
    """Every choice of the plan is one that this version follows.

    Raises:
        OrthoRankError: naming the field and the values that it may have.
    """
    for name, values in UNREADY.items():
        if getattr(config, name) in values:
            raise OrthoRankError(
                f"{name} is {getattr(config, name)!r}, which plans may say and this version does not follow yet; leave "
                f"{name} out for its default"
            )
