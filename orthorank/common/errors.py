"""The error that users of this package see, the one warning that code tells from others, and checks of arguments."""

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeGuard


class OrthoRankError(ValueError):
    """Something the user can mend: the message names the argument, what it was, what it may be and what to do."""


class UnknownKeysWarning(UserWarning):
    """A plan has keys that this version does not know and ignores."""


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """``value`` is an int, not a bool, of at least ``minimum`` and at most ``maximum``.

    Raises:
        OrthoRankError: it is not; ``name`` is the argument's.

    >>> check_integer("windows", 0, 1)
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: windows is 0; it must be an integer, 1 or more
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OrthoRankError(f"{name} is {shown(value)}; it must be an integer, {minimum} or more")
    if maximum is not None and value > maximum:
        raise OrthoRankError(f"{name} is {shown(value)}; it must be an integer from {minimum} to {maximum:,}")


def check_integers(values: Mapping[str, Any], **least: int) -> None:
    """Each of ``values`` that ``least`` names is None or an integer of at least so many; raises as `check_integer`.

    >>> check_integers({"windows": 4, "layers": None}, windows=1, layers=1)
    """
    for name, minimum in least.items():
        if values[name] is not None:
            check_integer(name, values[name], minimum)


def check_choice(name: str, value: object, legal: Iterable[str]) -> None:
    """``value`` is one of ``legal``.

    >>> check_choice("method", "beam", ("greedy", "one-shot", "influence"))
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: method is 'beam'; it may be greedy, one-shot or influence
    """
    *some, last = legal
    if value not in (*some, last):
        raise OrthoRankError(f"{name} is {shown(value)}; it may be {', '.join(some)}{' or ' if some else ''}{last}")


def check_share(name: str, value: object, what: str, *, zero: bool = False) -> None:
    """``value`` is a number above 0 (with ``zero`` 0 itself, too) and below 1; ``what`` follows in the sentence.

    >>> check_share("sparsity", 1.5, "such as 0.2")
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: sparsity is 1.5; it must be above 0 and below 1, such as 0.2
    """
    if not is_number(value) or not (0 <= value < 1 if zero else 0 < value < 1):  # NaN fails, too
        given = f"{value:g}" if isinstance(value, float) else shown(value)
        raise OrthoRankError(f"{name} is {given}; it must be {'from 0 to' if zero else 'above 0 and'} below 1, {what}")


def check_max_loss(value: object) -> None:
    """``value`` is None or a number of nats a token, 0 or more.

    >>> check_max_loss(-1.0)
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: max_loss is -1.0; it must be 0 or more, in nats a token, such as 0.05
    """
    if value is not None and not (is_number(value) and 0 <= value < float("inf")):
        raise OrthoRankError(f"max_loss is {shown(value)}; it must be 0 or more, in nats a token, such as 0.05")


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, of NumPy too, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """``value`` as an error shows it: cut short, and an integer of more digits than Python prints by its size.

    >>> shown("12"), shown(10**5000), len(shown([0] * 10**6)) < 100
    ("'12'", 'an integer of 16,610 bits', True)
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length():,} bits"
    try:
        return repr(value) if not isinstance(value, (list, tuple, set, dict)) else _REPR.repr(value)
    except ValueError:  # a long integer inside of it
        return type_of(value)


def type_of(value: object) -> str:
    """The type of ``value`` as an error says it.

    `orthorank_kernels.checks.type_of` says it too, and needs torch, which vLLM's plugin must not load to register.

    >>> type_of(1), type_of([]), type_of(None)
    ('an int', 'a list', 'None')
    """
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """The name of a type as an error says it."""
    if name == "NoneType":
        return "None"
    return f"{'an' if name[0] in 'aeioAEIO' or name == 'ndarray' else 'a'} {name}"


def reason_of(error: Exception) -> str:
    """What the error of another library says, in one line of bounded length.

    >>> reason_of(OSError("\\n  no room\\nleft")), reason_of(KeyError())
    ('no room', 'KeyError')
    """
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


# Of what a run that goes on must have in common, what is kept as a hash.
HASHED = {
    "ids_sha256": "calibration text or windows",
    "text_sha256": "text",
    "model_fingerprint": "model's weights",
    "config_fingerprint": "model's settings (config.json)",
}


def difference(name: str, before: str, now: str) -> str:
    """In which an earlier run is another one than this.

    >>> difference("layers", "2", "3"), difference("ids_sha256", "1f", "2e")
    ('its layers is 2 and now it is 3', "its calibration text or windows are not this one's")
    """
    return f"its {HASHED[name]} are not this one's" if name in HASHED else f"its {name} is {before} and now it is {now}"


_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 20
