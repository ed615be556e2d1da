"""The error that users of this package see, and the one warning that code tells from others."""


class OrthoRankError(ValueError):
    """Something the user can mend: the message names the argument, what it was, what it may be and what to do."""


class UnknownKeysWarning(UserWarning):
    """A plan has keys that this version does not know and ignores."""
