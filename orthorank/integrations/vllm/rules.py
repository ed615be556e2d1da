"""Where chunks of a prompt end, and which tokens of it are computed alike in every request that begins with them."""


def chunk_tokens(start: int, tokens: int, prompt: int, window: int) -> int:
    """How many of ``tokens`` a chunk from ``start`` on takes, so that it ends where a window or the prompt does.

    Example:
        >>> chunk_tokens(0, 100, prompt=300, window=64), chunk_tokens(256, 100, prompt=300, window=64)
        (64, 100)
    """
    end = start + tokens
    return tokens if end >= prompt else max(0, end // window * window - start)


def reusable_tokens(prompt: int, keep_last: int, window: int | None) -> int:
    """How many tokens at the beginning of a prompt are computed as in every other request that begins with them.

    Example:
        >>> reusable_tokens(300, 1, None), reusable_tokens(300, 1, 64), reusable_tokens(256, 1, 64)
        (299, 256, 192)
    """
    same = max(0, prompt - keep_last)
    return same if window is None else same // window * window
