"""`mhc_compile.integrations.StabilityCallback`: measure `mhc_compile.stability` during training."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.capture.tensor_tree import fresh, map_tensors
from mhc_compile.errors import MhcError, OptionError, warn
from mhc_compile.inspection.stream_stats.measure import Meter, first_batch, inputs_of, on_device, undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhc_compile.config.options import Options
    from mhc_compile.inspection.stream_stats.results import Stability

#: Classes whose instances trainers accept as callbacks.
_BASES = (
    ("transformers", "TrainerCallback"),  # loaded on first access
    ("lightning.pytorch.callbacks", "Callback"),
    ("pytorch_lightning.callbacks", "Callback"),
)


class StabilityCallback:
    """Measures `mhc_compile.stability` every few training steps, in one of three kinds of loops.

        Trainer(..., callbacks=[StabilityCallback(every=100)])                    transformers
        lightning.Trainer(callbacks=[StabilityCallback(every=100)])               Lightning
        callback = StabilityCallback(every=100, batch=batch)                      a custom loop
        for step, batch in enumerate(loader, 1): ...; callback.step(model, step)

    Measurements do not affect the training: parameters, gradients, buffers, random state and
    compiled versions are preserved. The first call measures too, so that a wrong batch is found
    immediately; the graph is traced only then. A model whose hyper-connections are attached by its
    first compiled call must have had that call.

    Import transformers or Lightning before making the callback: it becomes an instance of the
    callback classes of those that are imported.

    Args:
        every: steps between two measurements.
        batch: inputs of the model, the same each time so that measurements are comparable: one
            object as `mhc_compile.stability` takes it (a tensor, a tuple, a mapping). Default: the
            first training batch in Lightning, the first examples of the data set in transformers; a
            custom loop must give one, here or to `step`.
        log: called with the figures of `Stability.summary`, whose names get the prefix "mhc/", and
            "step".
        file: file to which a JSON line is appended for each measurement.
        options: as the model was compiled with; see `mhc_compile.stability`.
        warn_after: the step from which a measurement warns, once, if the streams have hardly parted
            (`Stability.close_streams`); None for never.

    Attributes:
        history: (step, Stability) of every measurement.

    Raises:
        OptionError: `every`, or `warn_after` if given, is not a positive integer.
    """

    history: list[tuple[int, Stability]]

    def __new__(cls, *args: Any, **kwargs: Any) -> StabilityCallback:  # noqa: ARG004, D102 - for __init__
        kind: type = cls
        found = (getattr(sys.modules.get(module), name, None) for module, name in _BASES)
        bases = tuple(base for base in found if isinstance(base, type))
        made: StabilityCallback = object.__new__(_subclass(kind, bases))
        return made

    def __init__(
        self,
        every: int = 100,
        batch: Any = None,
        log: Callable[[dict[str, float]], Any] | None = None,
        file: str | Path | None = None,
        *,
        options: Mapping[str, Any] | Options | None = None,
        warn_after: int | None = 1000,
    ) -> None:
        for name, value in (("every", every), ("warn_after", warn_after)):
            wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if wrong and (name, value) != ("warn_after", None):
                raise OptionError(f"StabilityCallback: {name} is {value!r}; expected a positive number of steps")
        self.every, self.batch, self.options = every, batch, options
        self._report = log  # Lightning sets a `log` on callbacks
        self.file = Path(file) if file is not None else None
        self.history = []
        self.warn_after = warn_after
        self._meter: Meter | None = None
        self._measured = -1

    def step(self, model: nn.Module, step: int, batch: Any = None) -> Stability | None:
        """Measure if a measurement is due, and return it; call it after each training step.

        `model` may be compiled, or wrapped in DDP; the first `step` is 0 or 1; `batch` replaces the
        callback's. Without any batch this is an MhcError, without hyper-connections an AttachError.
        """
        if not self._due(step):
            return None
        return self._measure(model, step, self.batch if batch is None else batch, contextlib.nullcontext())

    def close(self) -> None:
        """Drop the traced graph and keep the history. Trainers call it when a training ends."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Measure in transformers, which calls this after each optimizer step."""
        if not self._due(state.global_step):
            return
        if self.batch is None:
            with undisturbed(_inner(model)):
                self.batch = first_batch(kwargs.get("train_dataloader"), args.per_device_train_batch_size)
        self._measure(model, state.global_step, self.batch, contextlib.nullcontext())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Measure in Lightning after the first batch that follows an optimizer step."""
        if not self._due(trainer.global_step):
            return
        if self.batch is None:
            self.batch = map_tensors(batch, fresh)
        self._measure(pl_module, trainer.global_step, self.batch, trainer.precision_plugin.forward_context())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the callback; transformers and Lightning call this."""
        self.close()

    def _due(self, step: int) -> bool:
        return step != self._measured and (not self.history or step % self.every == 0)

    def _measure(self, model: nn.Module, step: int, batch: Any, context: Any) -> Stability:
        if batch is None:
            raise MhcError(
                "StabilityCallback has no batch to measure with: StabilityCallback(batch=...), or"
                " step(model, step, batch)"
            )
        model = _inner(model)
        if self._meter is None or self._meter.model is not model:
            self.close()
            self._meter = Meter(model, options=self.options)
        some = next(iter(connections(model).values()))
        with context:
            result = self._meter.measure(*inputs_of(model, (on_device(batch, some.phi.device),), {}))
        self._measured = step
        self.history.append((step, result))
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
            self._write(step, result)
        return result

    def _write(self, step: int, result: Stability) -> None:
        """Write and report the figures, and warn of close streams; only the first process does."""
        if self.warn_after is not None and step >= self.warn_after and result.close_streams:
            self.warn_after = None
            warn(f"step {step}: {result.close_streams}")
        if self.file is not None:
            line = {"step": step, "time": time.time(), **result.to_dict()}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._report is not None:
            self._report({"step": step, **{f"mhc/{name}": value for name, value in result.summary().items()}})

    def __reduce__(self) -> Any:
        """Copy without the traced graph, and with the callback classes of the new process."""
        return StabilityCallback, (), self.__dict__ | {"_meter": None}


@functools.cache
def _subclass(kind: type, bases: tuple[type, ...]) -> type:
    """Return a subclass of `kind` and, with lower precedence, of `bases`."""
    if not bases:
        return kind
    names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, *bases), names)


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and torch.compile, in either order."""
    while True:
        inside = unwrap(model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model)
        if inside is model:
            return inside
        model = inside
