"""What Triton's interpreter can do."""

import numpy as np


def interprets_bfloat16() -> bool:
    """Whether the interpreter adds and rounds bfloat16 as numbers, asked of itself: 1 + 1, and 1 + 3/512 to nearest."""
    try:
        from triton.language import bfloat16, float32
        from triton.runtime.interpreter import TensorHandle, interpreter_builder

        one = TensorHandle(np.array([0x3F80], np.uint16), bfloat16)
        total = interpreter_builder.binary_op(one, one, np.add)
        rounded = interpreter_builder.cast_impl(TensorHandle(np.array([1 + 3 / 512], np.float32), float32), bfloat16)
    except (ImportError, AttributeError, TypeError):  # another interpreter, of which nothing is known
        return False
    return (int(total.data[0]), int(rounded.data[0])) == (0x4000, 0x3F81)
