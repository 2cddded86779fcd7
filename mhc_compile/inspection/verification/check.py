"""`mhc_compile.check`: compare a rewritten model with the plain one, tensor by tensor."""

from __future__ import annotations

import logging
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mhc_compile import _torch
from mhc_compile.capture.tensor_tree import cast, map_tensors, tensors
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import CaptureError, MhcError, MhcWarning, OptionError, warn
from mhc_compile.inspection.audit import audit
from mhc_compile.inspection.random_state import kept_random_state, set_seed
from mhc_compile.inspection.verification.comparison import (
    TOLERANCES,
    RunRecord,
    differences,
    live_sites,
    randomize,
    record_run,
)
from mhc_compile.inspection.verification.results import CheckResult, Difference, OtherBatch, Seconds
from mhc_compile.inspection.verification.runners import Run, runner_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
#: The dtype that shows the rounding of the plain model.
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def check(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    **kwargs: Any,
) -> CheckResult:
    """Run `model` plain and rewritten, forward and backward, and compare every tensor.

    There are two comparisons, with the same random numbers on both sides. First, as
    `init="preserve"` promises, outputs, buffers, inputs that the model writes into, and the
    gradients of parameters and inputs equal those of the plain model. Second ("live"), with random
    parameters of the hyper-connections, the compiled model equals the same graph run by another
    compiler, and every site takes part in it. Further calls must compile nothing; a call with twice
    the batch is compared too, where the inputs show the batch size.

    A tensor is the same if its largest absolute error, over its largest entry, is at most
    `tolerance`: 1e-10 in float64, 1e-5 in float32, 1e-2 in bfloat16 and 2e-3 in float16. Gradients
    and buffers count as at least 1e-3 of the largest one, so that rounding noise is not compared
    with rounding noise. A larger deviation is excused if the plain model rounds as much: compared
    with the plain model in a wider dtype (float64; float32 for half precision), the rewritten one
    errs at most 4 times as much as the plain one.

    Copies of the model run: its parameters, buffers and gradients and the random state are kept.

    Args:
        model: any module, in the mode to be checked, or one that `torch.compile` returned, or an
            exported program, for which `mhc_compile.rewrite` is checked.
        *args: example inputs. A program without them uses those it was exported with.
        options: as for `torch.compile(model, backend="mhc", options=options)`. `init` is ignored:
            the first comparison uses "preserve", the second random parameters. Hyper-connections
            that the model has are removed for the first one, and keep their values in the second.
        dtype: cast the model and its inputs first: "float64", ..., or torch's. Not for programs.
        seed: of dropout and all other random numbers.
        tolerance: replaces the default; then nothing is excused.
        **kwargs: example inputs by name.

    Returns:
        The result: `result.ok`, `result.findings`, and `print(result)` with rich.

    Raises:
        OptionError: the options, the dtype or the tolerance are wrong.
        CaptureError: the plain model does not run with these inputs or gives NaN, or the compiled
            one raises.
        MhcError: raised by this package in the compiled model: NothingRewrittenError with `strict`,
            AttachError.
    """
    if dtype not in (None, *_DTYPES, *_DTYPES.values()):
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    wanted = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"tolerance is {tolerance!r}; expected a positive number")
    if isinstance(model, ExportedProgram):
        if wanted is not None:
            raise OptionError(
                f"dtype is {dtype!r}, and an exported program keeps its own; export the model in that dtype"
            )
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = model.example_inputs
    with kept_random_state(), _torch.numpy_draws_as_in_eager(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_seed(seed)
        if wanted is not None and isinstance(model, nn.Module):
            model, args, kwargs = deepcopy(model).to(wanted), cast(tuple(args), wanted), cast(dict(kwargs), wanted)
        parsed = Options.parse(options)
        if parsed.inner_backend == "inductor":  # with the random numbers of eager mode
            parsed = replace(parsed, inductor={"fallback_random": True, **parsed.inductor})
        result = _Comparison(model, (tuple(args), dict(kwargs)), parsed, seed, tolerance).run()
    messages = dict.fromkeys(str(entry.message) for entry in caught if isinstance(entry.message, MhcWarning))
    return replace(result, warnings=tuple(messages))


def _preserving(options: ResolvedOptions) -> ResolvedOptions:
    try:
        return replace(options, init="preserve")
    except OptionError as error:
        raise OptionError(
            "check compares the rewritten model with the plain one, and with these options they never compute the"
            f" same: {error}"
        ) from None


class _Comparison:
    """One check, step by step; `run` lists the steps."""

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        options: ResolvedOptions,
        seed: int,
        tolerance: float | None,
    ) -> None:
        self.runner = runner_of(model, options)
        self.mode = ("train" if model.training else "eval") if isinstance(model, nn.Module) else "exported"
        self.inputs, self.options, self.seed, self.strict = inputs, options, seed, tolerance is not None
        self.tolerance = tolerance or TOLERANCES.get(self.runner.dtype, TOLERANCES[torch.float32])
        self.differentiable = True
        self.wider = ""

    def run(self) -> CheckResult:
        want, plain_seconds = self._plain()
        try:
            planned = self.runner.planned(*self.inputs)
        except CaptureError as error:  # a dry run has no values: the model may compile nevertheless
            planned = None
            warn(f"no dry run, so that the number of sites is not known: {error}")
        run = self.runner.rewritten(_preserving(self.options))
        got, first_seconds = _timed(lambda: self._compiled(run))
        if run.graphs > 1:  # both halves of a branch that a graph break splits work from the second call on
            run.restore()
            got = self._compiled(run)
        compared = self._differences(got, want, self.runner.plain, self.inputs)
        graphs = run.graphs
        before = audit(run.module)
        for _ in range(2):
            run.restore()
            _, compiled_seconds = _timed(lambda: self._compiled(run))
        counts = zip(before.sites, audit(run.module).sites, strict=True)
        computed = {now.path: now.computed - then.computed for then, now in counts}
        recompiles = run.graphs - graphs
        sites = len(run.connections())
        other_batch, further = self._other_batch(run)
        live, live_tensors = self._live(run) if sites else (set(), [])
        inner = self.options.inner_backend
        return CheckResult(
            model=self.runner.name,
            mode=self.mode,
            dtype=str(self.runner.dtype).removeprefix("torch."),
            inner_backend=inner if isinstance(inner, str) else getattr(inner, "__name__", "callable"),
            seed=self.seed,
            tolerance=self.tolerance,
            planned=planned if planned is not None else sites,
            sites=sites,
            live=len(live),
            missed={path: number for path, number in computed.items() if not number or number % 2},
            graphs=graphs,
            recompiles=recompiles,
            other_batch=other_batch,
            own=self.runner.attached,
            wider=self.wider,
            tensors=(*compared, *further, *live_tensors),
            warnings=(),
            seconds=Seconds(plain_seconds, first_seconds, compiled_seconds),
        )

    def _plain(self) -> tuple[RunRecord, float]:
        """Return the record of the plain model, and the time of a second run."""
        try:
            want = self._attempt(self.runner.plain, self.inputs, "inputs that require gradients")
            if want is None:  # a model that writes into its inputs cannot differentiate them
                self.differentiable = False
                want = self._record(self.runner.plain())
        except Exception as error:  # any model code
            shown = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors(self.inputs, "input"))
            inputs = f"the example inputs ({shown or 'none'})"
            raise CaptureError(f"{self.runner.name} itself does not run with {inputs}: {_line(error)}") from error
        nan = [name for name, value in (want.outputs | want.gradients).items() if value.isnan().any()]
        if nan:
            raise CaptureError(
                f"{self.runner.name} itself gives NaN in {', '.join(nan[:3])}: there is nothing to compare with."
                " Choose other example inputs"
            )
        return want, _timed(lambda: self._record(self.runner.plain()))[1]

    def _attempt(self, make: Callable[[], Run], inputs: Any, conditions: str) -> RunRecord | None:
        """Return the record of a run that the model's code may not allow, None if it raises."""
        try:
            return self._record(make(), inputs)
        except Exception:  # any model code
            log.debug("%s does not run with %s", self.runner.name, conditions, exc_info=True)
            return None

    def _record(self, run: Run, inputs: Any = None) -> RunRecord:
        args, kwargs = self.inputs if inputs is None else inputs
        return record_run(run.call, run.module, args, kwargs, differentiable_inputs=self.differentiable, seed=self.seed)

    def _compiled(self, run: Run, inputs: Any = None) -> RunRecord:
        try:
            return self._record(run, inputs)
        except MhcError:
            raise
        except Exception as error:
            raise CaptureError(f"{self.runner.name} runs, and the compiled one does not: {_line(error)}") from error

    def _differences(
        self, got: RunRecord, want: RunRecord, make: Callable[[torch.dtype], Run], inputs: Any, prefix: str = ""
    ) -> list[Difference]:
        """Compare every tensor; if one deviates, a run in a wider dtype may excuse it."""
        found = list(differences(got, want, self.tolerance, prefix=prefix))
        wider = _WIDER.get(self.runner.dtype)
        if self.strict or wider is None or all(one.ok for one in found):
            return found
        exact = self._attempt(lambda: make(wider), cast(inputs, wider), f"dtype {wider}")
        if exact is None:  # a dtype may be written into the model
            return found
        self.wider = str(wider).removeprefix("torch.")
        return list(differences(got, want, self.tolerance, exact=exact, dtype=self.runner.dtype, prefix=prefix))

    def _other_batch(self, run: Run) -> tuple[OtherBatch | None, list[Difference]]:
        doubled = _doubled(self.inputs)
        if doubled is None:
            return None, []
        size, inputs = doubled
        want = self._attempt(self.runner.plain, inputs, f"a batch of {size}")
        if want is None:  # the model may fix the batch size
            return None, []
        before = run.graphs
        run.restore()
        got = self._compiled(run, inputs)
        found = self._differences(got, want, self.runner.plain, inputs, f"batch {size}: ")
        return OtherBatch(size, run.graphs - before), found

    def _live(self, run: Run) -> tuple[set[str], list[Difference]]:
        """Return the sites that take part, and the comparison with another compiler."""
        if self.runner.attached:
            run = self.runner.rewritten(self.options, own=True)
            self._compiled(run)
        else:
            randomize(run.module, [run.connections(), run.connections(read_outs=True)], self.seed)
        run.restore()
        other = self.runner.other(run, self.options)
        got, want = self._settled(run), self._settled(other)

        def wide(dtype: torch.dtype) -> Run:
            run.restore()
            copied = self.runner.other(run, self.options, dtype)
            self._record(copied, cast(self.inputs, dtype))
            copied.restore()
            return copied

        def outputs() -> dict[str, Tensor]:
            run.restore()
            return self._compiled(run).outputs

        compared = self._differences(got, want, wide, self.inputs, "live: ")
        return live_sites(run.connections(), got.gradients, outputs), compared

    def _settled(self, run: Run) -> RunRecord:
        """Return the record of the second call, in which both halves of split branches work."""
        self._compiled(run)
        run.restore()
        return self._compiled(run)


def _timed(call: Callable[[], RunRecord]) -> tuple[RunRecord, float]:
    """Return the record that a call makes, and its time in seconds."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def _doubled(inputs: Any) -> tuple[int, Any] | None:
    """Return the doubled batch size and inputs; None unless all tensors agree on the first size."""
    sizes = {value.shape[0] if value.dim() else -1 for _, value in tensors(inputs, "input")}
    if len(sizes) != 1 or sizes <= {-1, 0}:
        return None
    return 2 * sizes.pop(), map_tensors(inputs, lambda value: torch.cat([value, value]))


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
