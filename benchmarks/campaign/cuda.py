"""All CUDA calls of the campaign. `dry.Cpu` has the same methods, and everything else is tested with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.cuda import Event


class Gpu:
    """The current GPU."""

    device, dtype, backend, target = torch.device("cuda"), torch.bfloat16, "triton", "the GPU"

    def __init__(self) -> None:
        from orthorank_kernels.triton import timing

        self.replay, self.other = timing.Replay, timing.flushed_by()

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(0)
        return {"gpu": found.name, "GiB": found.total_memory >> 30, "capability": f"{found.major}.{found.minor}",
                "SMs": found.multi_processor_count, "L2 MiB": found.L2_cache_size >> 20, "torch": torch.__version__,
                "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # fmt: skip

    def flush(self) -> None:
        """Read other data: then the L2 cache holds nothing of ours, and nothing that has to be written back."""
        self.other.amax()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def around(self, call: Callable[[], Any]) -> float:
        """Seconds between events around a call."""
        begin, end = Event(enable_timing=True), Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        self.wait()
        return begin.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """What a captured call writes to, and a replay of [flush, event, call, event] that gives its seconds."""
        captured = self.replay(call, self.other)
        return captured.result, lambda: captured() / 1e3

    def free(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:  # bytes that were held at most since `free`
        return torch.cuda.max_memory_allocated()

    def probes(self, every: list[Any]) -> tuple[list[Any], Callable[[Any], Any]]:
        """The PTX probes that this GPU has, and what runs one."""
        from tests.ptx.cuda_driver import Gpu, architecture, assemble, generation

        capability = torch.cuda.get_device_capability()
        known = [probe for probe in every if generation(capability) in probe.targets]
        return known, Gpu(assemble(known, architecture(capability))).run
