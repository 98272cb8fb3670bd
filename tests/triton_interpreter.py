"""Triton's interpreter, which runs kernels on a CPU under TRITON_INTERPRET=1, with its bfloat16 made right.

As of Triton 3.6 it multiplies the bits of bfloat16 operands as integers and cuts float32 off where GPUs round; and it
needs NumPy below 2.4.
"""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def correct_bfloat16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = src.data.view(np.uint32)
            to_even = np.where(np.isnan(src.data), 0, 0x7FFF + (bits >> 16 & 1)).astype(np.uint32)
            return TensorHandle(((bits + to_even) >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    setattr(InterpreterBuilder, "create_dot", create_dot)  # noqa: B010 (untyped as it is)
    setattr(InterpreterBuilder, "cast_impl", cast_impl)  # noqa: B010
