"""The error that users of this package see."""


class OrthoRankError(ValueError):
    """Something the user can mend: the message names the argument, what it was, what it may be and what to do."""
