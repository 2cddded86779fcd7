"""Compiles the kernels of a chain before they are called, in threads, while a model is traced."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import triton

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.mappings import columns

from . import operators
from .launch import COMPILING, Launch, noted

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def launches_of(
    streams: torch.dtype, branch: torch.dtype, n: int, width: int, mapping: str, *, shifted: bool = False
) -> list[Launch]:
    """Return the launches of a chain's operators, forward and backward, for tensors on "meta".

    A chain reads n equal streams, then updates these, then n streams, and closes them. With
    `shifted` the sites of a single pass. The number of tokens makes no other kernel.
    """
    tokens = 64
    one = _site(streams, branch, n, 1, width, tokens, mapping)
    many = _site(streams, branch, n, n, width, tokens, mapping)
    how = (mapping, 20, 1e-6)
    with noted() as launches:
        if shifted:
            for old, pre, site in (one, many):
                new, h, *rest = operators.shifted_step(*old, pre, *site, *how)
                saved = (rest[0], rest[1], rest[3], rest[4])
                operators.shifted_step_backward(new, h, *rest[:3], *old, pre, *site, *saved, *how)
                operators.mix_read_backward(*operators.mix_read(*old, pre), *old, pre)
        else:
            (streams_of_one, *_), _, site = one
            h, *rest = operators.read(streams_of_one, *site, n, *how)
            saved = (rest[0], rest[1], rest[3], rest[4])
            operators.read_backward(h, rest[1], rest[2], streams_of_one, *site, *saved, *how)
            for old, _, site in (one, many):
                new, h, *rest = operators.step(*old, *site, *how)
                saved = (rest[0], rest[1], rest[3], rest[4])
                operators.step_backward(new, h, rest[1], rest[2], *old, *site, *saved, *how)
        operators.close_backward(operators.close(*many[0]), *many[0])
    return launches


def _site(
    streams: torch.dtype, branch: torch.dtype, n: int, m: int, width: int, tokens: int, mapping: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return `(streams, branch, post, res)`, `pre` and `(phi, bias, scale)` on "meta"."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    count = columns(parse(mapping).mapping, n)
    assert count is not None, (mapping, n)
    old = make(tokens, m, width, dtype=streams), make(tokens, width, dtype=branch), make(tokens, n), make(tokens, n, n)
    return old, make(tokens, n), (make(n * width, count), make(count), make(3))


def prepare(launches: list[Launch], device: torch.device) -> threading.Thread:
    """Compile kernels for `device` in threads; return the one that waits for them."""
    thread = threading.Thread(target=_compile, args=(launches, device), daemon=True, name="mhc-kernels")
    COMPILING.append(thread)
    thread.start()
    return thread


def _compile(launches: list[Launch], device: torch.device) -> None:
    try:
        with (
            torch.cuda.device(device),
            ThreadPoolExecutor(os.cpu_count()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for launch in launches:
                arguments = [_like(argument) for argument in launch.arguments]
                launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants)
    except Exception:  # the call that needs a kernel compiles it again, and raises where a user sees it
        log.debug("compiling the kernels ahead failed", exc_info=True)


def _like(argument: Any) -> Any:
    """Return what `warmup` takes for a tensor: its dtype."""
    return argument.dtype if isinstance(argument, torch.Tensor) else argument
