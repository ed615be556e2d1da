"""vLLM's own Triton kernels on a machine without a GPU: in Triton's interpreter."""

import os
from types import SimpleNamespace


def let_the_interpreter_be_triton() -> None:
    """Before vLLM is imported: it asks for a Triton with a driver, and the interpreter needs none."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)
