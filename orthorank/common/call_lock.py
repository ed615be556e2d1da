"""One thread at a time: the lock of a patched model, which refuses instead of waiting."""

import threading
from types import TracebackType

from orthorank.common.errors import OrthoRankError


class CallLock:
    """Held by the thread that calls a patched model, or that is inside `generate()` or one of the handle's contexts.

    That thread may enter again; another one is refused at once, whatever it is about to do. Deep copies and pickles of
    a model have a lock of their own, not held. Compiled code does not touch it: a lock would break the graph.

    Example:
        >>> lock = CallLock()
        >>> with lock, lock:
        ...     lock.is_mine()
        True
        >>> lock.is_mine()
        False
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0

    def is_mine(self) -> bool:
        """Whether the thread that asks holds the lock."""
        return self._thread == threading.get_ident()  # only this thread writes its own number there

    def __enter__(self) -> None:
        if not self.is_mine():
            if not self._lock.acquire(blocking=False):
                raise OrthoRankError(
                    "a model with a plan applied is in use by another thread, and serves one at a time (a call, "
                    "generate(), decoding(), prefilling(), context(), watching() or remove()); give each thread a "
                    "copy.deepcopy of the patched model, or take turns with a lock"
                )
            self._thread = threading.get_ident()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._thread = None
            self._lock.release()

    def __reduce__(self) -> tuple[type["CallLock"], tuple[()]]:
        return CallLock, ()
