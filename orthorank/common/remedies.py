"""What to run where a library is missing."""


def install(extra: str, options: str = "") -> str:
    """The command that installs the ``extra`` of this package, which is on no index yet.

    Args:
        extra: of pyproject.toml. options: of pip.

    Example:
        >>> install("plot")
        "pip install '.[plot]' in a checkout of orthorank-kernels"
    """
    return f"pip install {options and options + ' '}'.[{extra}]' in a checkout of orthorank-kernels"
