"""Assembles probes with the ptxas that Triton brings, and runs them on a GPU through the CUDA driver.

Memory and the context are PyTorch's; modules and launches are the driver's, by ctypes.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptx.probes import Probe, inputs_of, module, outputs_of

DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def architecture(capability: tuple[int, int]) -> str:
    """Of a GPU's compute capability; from 9.0 on with what only this one has (wgmma, tcgen05).

    >>> architecture((8, 6)), architecture((9, 0)), architecture((10, 0))
    ('sm_86', 'sm_90a', 'sm_100a')
    """
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def generation(capability: tuple[int, int]) -> int:
    """Which probes a GPU has: those of 80, 90 or 100. Others than data centre Blackwell have neither list in full.

    >>> generation((8, 9)), generation((9, 0)), generation((10, 3)), generation((12, 0))
    (80, 90, 100, 80)
    """
    return {9: 90, 10: 100}.get(capability[0], 80)


def assemble(probes: Sequence[Probe], target: str) -> bytes:
    """The probes as machine code for ``target`` (sm_90a ...). Raises RuntimeError with what ptxas says."""
    from triton.backends.nvidia.compiler import get_ptxas

    number = int("".join(c for c in target if c.isdigit()))
    with tempfile.TemporaryDirectory() as folder:
        text, code = Path(folder) / "probes.ptx", Path(folder) / "probes.cubin"
        text.write_text(module(probes, target), encoding="utf-8")
        command = [get_ptxas(number).path, f"--gpu-name={target}", str(text), "-o", str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses the probes for {target}: {done.stderr or done.stdout}")
        return code.read_bytes()


class Gpu:
    """Probes loaded on the current GPU."""

    def __init__(self, code: bytes):
        import torch

        torch.cuda.init()
        torch.empty(1, device="cuda")  # makes PyTorch's context the current one
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self.module), code)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name} fails with {status}: {(text.value or b'unknown').decode()}")

    def run(self, probe: Probe) -> list[np.ndarray]:
        """What `tests.ptx.probes.run_here` gives, from the GPU."""
        import torch

        shared = [probe.shared.reshape(-1).view(np.uint8), np.zeros(probe.shared.nbytes, np.uint8)]
        shared = shared if probe.shared.nbytes else []
        arrays = [*inputs_of(probe), *shared, *outputs_of(probe)]
        buffers = [torch.from_numpy(a.view(np.uint8).copy()).cuda() for a in arrays]
        torch.cuda.synchronize()
        self._launch(probe, [buffer.data_ptr() for buffer in buffers])
        self._call("cuCtxSynchronize")
        back = [buffer.cpu().numpy().view(a.dtype) for buffer, a in zip(buffers, arrays, strict=True)]
        given = len(probe.inputs)
        outputs = back[given + len(shared) :]
        return [*(output[: probe.count] for output in outputs), *back[given + 1 : given + len(shared)]]

    def _launch(self, probe: Probe, pointers: list[int]) -> None:
        function, size = ctypes.c_void_p(), probe.shared.nbytes
        self._call("cuModuleGetFunction", ctypes.byref(function), self.module, probe.name.encode())
        if size > 48 * 1024:
            self._call("cuFuncSetAttribute", function, DYNAMIC_SHARED, size)
        values = [ctypes.c_uint64(pointer) for pointer in pointers]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid, block = (probe.programs, 1, 1), (probe.threads, 1, 1)
        self._call("cuLaunchKernel", function, *grid, *block, size, None, parameters, None)
