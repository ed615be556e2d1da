"""What the launchers choose in the cases: which settings they look up, which kernels they launch with which options.

    python -m tests.ptx.coverage sm_90          # as JSON: settings by op, values by kernel and parameter

Nothing is compiled or run: launches are noted instead. In a process of its own, like `worker`.
"""

import argparse
import json
from collections import defaultdict
from typing import Any

import torch

from orthorank_kernels import dispatch
from orthorank_kernels.settings import lookup as _settings
from tests.ptx.cases import cases_for
from tests.ptx.worker import call

Choices = dict[str, dict[str, set[str]]]


def value_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else str(value)


def note_choices(target: str) -> tuple[dict[str, set[str]], Choices]:
    """Kinds of settings by op, and values of pointers (by dtype, or None) and constants by kernel and parameter."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from benchmarks.static.worker import AbsentGpu
    from orthorank_kernels.triton import configs

    driver.set_active(AbsentGpu(target))
    configs.target_of = lambda device: target
    dispatch.triton_unavailable = lambda device: None
    kinds: dict[str, set[str]] = defaultdict(set)
    choices: Choices = defaultdict(lambda: defaultdict(set))
    look_up = _settings.look_up

    def noted(op: str, kind: str, target: str) -> _settings.Settings:
        kinds[op].add(kind)
        return look_up(op, kind, target)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        for parameter in self.params:
            value = values.get(parameter.name)
            if parameter.is_constexpr or parameter.name.endswith("_ptr"):
                choices[self.fn.__name__][parameter.name].add(value_name(value))

    _settings.look_up = noted
    JITFunction.run = launch
    for case in cases_for(target):
        call(case, "triton")
    return kinds, choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90 or sm_100")
    target = parser.parse_args().target
    kinds, choices = note_choices(target)
    family = _settings.family(target)
    print(
        json.dumps(
            {
                "kinds": {op: sorted(found) for op, found in kinds.items()},
                "all kinds": {op: sorted(_settings._defaults(op, family)) for op in _settings.FIELDS},
                "choices": {k: {n: sorted(v) for n, v in by.items()} for k, by in choices.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
