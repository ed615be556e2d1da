"""The attention kernels, as data: how each is chosen, and how it is switched off where it hangs, fails or is wrong.

The first one that works is what the package takes by itself. A kernel of another kind gets an entry here, and smoke
tries it, attention times it, and its environment variable switches it off.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WITHOUT = "ORTHORANK_CAMPAIGN_WITHOUT"  # what no step may use, for kernels that the package cannot switch off


@dataclass(frozen=True)
class Kernel:
    """One way in which `sparse_query_attention` can run.

    Args:
        name: as results name it.
        chosen: environment with which the package takes it.
        off: environment that switches it off for every later step.
        timed: whether its rate is a result of its own.
        asked: the package takes it only where it is asked to, so layers and models do not run it.
    """

    name: str
    chosen: Mapping[str, str]
    off: Mapping[str, str]
    timed: bool = False
    asked: bool = False


KERNELS = (
    Kernel("TMA descriptors", {"ORTHORANK_TMA": "1"}, {"ORTHORANK_TMA": "0"}, timed=True),
    Kernel("pointers", {"ORTHORANK_TMA": "0"}, {WITHOUT: "pointers"}),
    Kernel(
        "hopper", {"ORTHORANK_TMA": "1", "ORTHORANK_ATTENTION": "hopper"}, {f"{WITHOUT}_HOPPER": "1"}, timed=True,
        asked=True,
    ),
)  # fmt: skip


def working(environment: Mapping[str, str] = os.environ) -> list[Kernel]:
    """The kernels that are not switched off in ``environment``, the preferred one first."""
    return [k for k in KERNELS if any(environment.get(name) != value for name, value in k.off.items())]


def usual() -> list[Kernel]:
    """Those of `working` that the package takes by itself."""
    return [kernel for kernel in working() if not kernel.asked]


def timed() -> list[Kernel]:
    """Those whose rates are results: the ones marked so, or the only one that is left."""
    left = usual()
    own = [kernel for kernel in left if kernel.timed] or left[:1]
    return own + [kernel for kernel in working() if kernel.asked and kernel.timed]


@contextlib.contextmanager
def choosing(kernel: Kernel) -> Iterator[None]:
    """Inside, the package takes this kernel, in this process."""
    from orthorank_kernels.triton import configs

    before = {name: os.environ.get(name) for name in kernel.chosen}
    os.environ.update(kernel.chosen)
    configs._has_descriptors.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        configs._has_descriptors.cache_clear()
