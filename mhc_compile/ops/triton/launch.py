"""Launch and tuning of kernels: by `wrap_triton`, visible to compilers, or by the interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from collections.abc import Callable


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `grid`, a tuple or a function of the tuned constants."""
    wrapped = kernel if interpreted() else torch.library.wrap_triton(kernel)
    wrapped[grid](*arguments, **constants)


def tuned(key: list[str], *choices: tuple[int, int, int]) -> Callable[[Any], Any]:
    """Autotune over (`block_tokens`, warps, stages) for every value of `key`.

    All choices give the same numbers up to rounding. The interpreter takes the first one.
    """
    configs = [triton.Config({"block_tokens": rows}, num_warps=warps, num_stages=deep) for rows, warps, deep in choices]
    return triton.autotune(configs[:1] if interpreted() else configs, key=key)  # type: ignore[no-any-return]
