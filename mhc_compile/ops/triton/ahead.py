"""Compiles the kernels of a chain before they are called, in threads, while a model is traced."""

from __future__ import annotations

import functools
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import triton

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.mappings import columns
from mhc_compile.ops import triton as operators
from mhc_compile.ops.lazy_reference import LONGEST

from .launch import COMPILING, Launch, noted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

log = logging.getLogger(__name__)
_ON_META = functools.partial(torch.empty, dtype=torch.float32, device="meta")


def launches_of(
    streams: torch.dtype, branch: torch.dtype, n: int, width: int, mapping: str, *, tokens: int = 64,
    single_pass: bool = False, lazy: bool = False, norm: str = "",
    make: Callable[..., Tensor] = _ON_META, run: Callable[..., Any] | None = None,
) -> dict[str, list[Launch]]:  # fmt: skip
    """Return the launches of a chain's operators, noted on "meta", by operator and m.

    A chain reads n equal streams, of which one is held, then updates these, then n streams, and
    closes them. In a single pass sites read with the weights of the site before. With `lazy`
    streams there are also steps that do not write them, or do not find them. The number of `tokens`
    makes no other kernel. With a `norm` each h has one, with a gain of the streams' dtype (and for
    "layer" a shift), and it has the dtype of the branch, if that is the narrower one; kernels of
    another norm are compiled by their first call.
    With `run(operator, args)` nothing is noted: it calls them with tensors of another `make`.
    """
    count = columns(parse(mapping).mapping, n)
    assert count is not None, (mapping, n)
    site, how = (make(n * width, count), make(count), make(3)), (mapping, 20, 1e-6)
    pre, post, res = make(tokens, n), make(tokens, n), make(tokens, n, n)
    gain = make(width, dtype=streams) if norm else None
    kind = norm, gain, gain if norm == "layer" else None
    reading = (*kind, 1e-6, branch if branch.itemsize < streams.itemsize else None)
    launches: dict[str, list[Launch]] = {}

    def note(name: str, *args: Any) -> Any:
        if run is not None:
            return run(getattr(operators, name.split(",")[0]), args)
        with noted() as launches[name.replace("_", " ")]:
            return getattr(operators, name.split(",")[0])(*args)

    def saved(read: list[Tensor]) -> list[Any]:
        # pre, post, z and inverse, and what follows in a backward
        return [*(read[i] for i in (1, 2, 4, 5)), *how, *kind, read[-1]]

    for m in dict.fromkeys((1, n)):
        held = make(tokens, m, width, dtype=streams)
        old = held, make(tokens, width, dtype=branch), post, res
        if single_pass:
            new, *read = note(f"shifted_step, m={m}", *old, pre, *site, *how, *reading)
            note(f"shifted_step_backward, m={m}", new, *read[:4], *old, pre, *site, *saved(read))
            *outs, moments = note(f"mix_read, m={m}", *old, pre, *reading)
            note(f"mix_read_backward, m={m}", *outs, *old, pre, *kind, moments)
            continue
        if m == 1:
            read = note("read, m=1", held, *site, n, *how, *reading)
            note("read_backward, m=1", read[0], *read[2:4], held, *site, *saved(read))
        new, *read = note(f"step, m={m}", *old, *site, *how, *reading)
        note(f"step_backward, m={m}", new, read[0], *read[2:4], *old, *site, *saved(read))
        for older in range(LONGEST["cuda"] if lazy else 0):
            sites = [[make(*one.shape, dtype=one.dtype) for _ in range(older + 1)] for one in old[1:]]
            write = older + 1 == LONGEST["cuda"]
            note(f"lazy_step, m={m}, {older} older", held, *sites, *site, write, *how, *reading)
            if older:
                grads = make(tokens, n, width, dtype=streams), read[0], *read[2:4]
                note(f"lazy_step_backward, m={m}, {older} older", *grads, held, *sites, *site, *saved(read))
    note(f"close_backward, m={n}", note(f"close, m={n}", *old), *old)
    return launches


def prepare(launches: Iterable[Launch], device: torch.device) -> threading.Thread:
    """Compile kernels for `device` in threads; return the one that waits for them."""
    thread = threading.Thread(target=_compile, args=(list(launches), device), daemon=True, name="mhc-kernels")
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
