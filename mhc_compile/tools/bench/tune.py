"""A search for faster configurations of the Triton kernels, for `mhc bench --tune`."""

from __future__ import annotations

import itertools
import timeit
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from triton.testing import do_bench_cudagraph

from mhc_compile.ops.norm_reference import NORMS
from mhc_compile.ops.triton import ahead, configs
from mhc_compile.ops.triton.launch import noted

if TYPE_CHECKING:
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.reporting.progress import Silent
    from mhc_compile.tools.bench.sites import Shape


def tune(shapes: list[Shape], options: ResolvedOptions, progress: Silent, norms: Any = NORMS) -> dict[str, Any]:
    """Return a file of configurations for chains of `shapes`, which differ in width, with `norms`.

    A kernel has its `config`, T, milliseconds, those `before`, and how many were tried, and timed:
    the others raised an error, or their results were not those of what was in use.
    """
    used, trial, users = (dict[str, Any]() for _ in range(3))

    def run(operator: Any, args: tuple[Any, ...]) -> Any:
        used.clear()
        result = operator(*args)
        for name, config in used.items():
            users.setdefault(name, (config, []))[1].append((partial(operator, *args), result))
        return result

    configs.CHOOSER = lambda name, config: trial.get(name, used.setdefault(name, config))
    try:
        for shape, norm in itertools.product(shapes, norms):
            ahead.launches_of(
                shape.real, shape.real, options.streams, shape.width, options.spec,
                tokens=shape.tokens, single_pass=bool(options.single_pass), lazy=options.streams <= 4, norm=norm, run=run,
                make=lambda *sizes, dtype=torch.float32: (0.1 * torch.randn(sizes, device=shapes[0].device)).to(dtype),
            )  # fmt: skip
        kernels = {name: _search(name, one, trial, shapes[0].device, progress) for name, one in users.items()}
    finally:
        configs.CHOOSER = None
    return {**configs.head(), "kernels": {name: {"tokens": shapes[0].tokens, **one} for name, one in kernels.items()}}


def _search(name: str, user: Any, trial: dict[str, Any], device: str, progress: Silent) -> dict[str, Any]:
    """Return the fastest of what is in use and what has one constant a step away."""
    progress.phase(name)
    (config, calls), ms = user, {}
    new = [config]
    for key, value in config.constants.items():
        values = configs.OTHERS.get(key, configs.SIZES)
        for other in (*values[: (at := values.index(value))][-1:], *values[at + 1 :][:1]):
            with suppress(ValueError):  # no launch takes it
                new.append(configs.checked(name, {**config.constants, key: other}))
    if device == "cuda":  # compile all at once
        with noted() as launches:
            _ = [call() for trial[name] in new for call, _ in calls]
        ahead.prepare(launches, torch.device(device))
    for index, trial[name] in enumerate(new):
        try:
            if not all(_agree(call(), want) for call, want in calls):
                raise ArithmeticError("other results")
            call = calls[-1][0]  # with n streams, as at all sites but the first
            ms[index] = do_bench_cudagraph(call) if device == "cuda" else 1e3 * timeit.timeit(call, number=1)
        except Exception as error:  # such as too little shared memory
            if not index:
                raise
            progress.note(f"{name}: skipped {new[index].constants}: {type(error).__name__}: {error}")
    best = min(ms, key=ms.__getitem__)
    return {"config": new[best].constants, "ms": ms[best], "before": ms[0], "tried": len(new), "timed": len(ms)}


def _agree(got: Any, want: Any) -> bool:
    """Return whether results differ, in the 2-norm, by no more than another order of sums makes."""
    pairs = [(got, want)] if isinstance(got, torch.Tensor) else zip(got, want, strict=True)
    return all((a.float() - b).norm() <= (1e-3 if a.itemsize == 4 else 1e-2) * b.float().norm() for a, b in pairs)
