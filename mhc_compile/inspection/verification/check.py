"""`mhc_compile.check`: the proof, on this machine, that a rewritten model computes what the plain one does."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mhc_compile import _torch
from mhc_compile.capture.tensor_tree import cast, map_tensors, tensors
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import CaptureError, MhcError, MhcWarning, OptionError, warn
from mhc_compile.inspection.verification.comparison import Difference, differences, tolerance_of
from mhc_compile.inspection.verification.liveness import live_sites, randomize
from mhc_compile.inspection.verification.observation import Observation, observe, seeded
from mhc_compile.inspection.verification.result import CheckResult, OtherBatch, Seconds
from mhc_compile.inspection.verification.subjects import Side, Subject, subject_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check"]

#: Dtypes in which a model can be compared.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
#: In which a model is run to see how much the plain one is rounded.
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
_FURTHER_CALLS = 2


def check(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    **kwargs: Any,
) -> CheckResult:
    """Runs `model` plain and rewritten, forward and backward with the same random numbers, and compares every tensor.

    Two proofs. The first: as `init="preserve"` promises, outputs, buffers, inputs that the model writes into, and the gradients of parameters and
    inputs are those of the plain model. The second, "live": with hyper-connections whose parameters are random, far from that start, the
    compiled model equals the same graph run by another compiler, and every site takes part in it. Then further calls must compile nothing, and
    a call with twice the batch is compared too, where the inputs show what the batch is.

    A tensor is the same if its largest absolute error, over its largest entry, is at most `tolerance`: 1e-10 in float64, 1e-5 in float32, 1e-2 in
    bfloat16 and 2e-3 in float16. A gradient or buffer counts as at least 1e-3 of the largest one, so that rounding noise is not compared with
    rounding noise. A tensor that deviates by more is excused if the plain model rounds as much: if against the plain model in a wider dtype
    (float64; float32 for half precision) the rewritten one errs at most 4 times as much as the plain one.

    The model works in copies: parameters, buffers, gradients and random numbers of the caller stay as they are.

    Args:
        model: any module, in the mode in which it is to be checked, or one that `torch.compile` returned, or an exported program, for which
            `mhc_compile.rewrite` is checked.
        *args: example inputs. Those of a program, if none are given, are what it was exported with.
        options: as for `torch.compile(model, backend="mhc", options=options)`. `start` has no say: the first proof is about
            "preserve", and the second one about random parameters. Hyper-connections that the model has already are left out of the first
            proof, and have the values that they came with in the second one.
        dtype: cast the model and its inputs first; "float64" and so on, or torch's. A program keeps its own.
        seed: of dropout and all other random numbers.
        tolerance: instead of the default one; then nothing is excused.
        **kwargs: example inputs by name.

    Returns:
        The result; `result.ok`, `result.findings`, and `print(result)` with rich.

    Raises:
        OptionError: the options, the dtype or the tolerance are wrong.
        CaptureError: the plain model does not run with these inputs or gives NaN, or the compiled one raises.
        MhcError: what the compiled model raises of this package: NothingRewrittenError with `strict`, AttachError.
    """
    wanted = _dtype(dtype)
    if tolerance is not None and not tolerance > 0:
        raise OptionError(f"tolerance is {tolerance!r}; expected a positive number")
    if isinstance(model, ExportedProgram):
        if wanted is not None:
            raise OptionError(
                f"dtype is {dtype!r}, and an exported program keeps its own; export the model in that dtype"
            )
        if not args and not kwargs and model.example_inputs is not None:
            args, kwargs = model.example_inputs
    with seeded(seed), _torch.numpy_draws_as_in_eager(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        proof = _Proof(
            _cast(model, wanted), *_inputs(args, kwargs, wanted), _repeatable(Options.parse(options)), seed, tolerance
        )
        result = proof.run()
    told = dict.fromkeys(str(entry.message) for entry in caught if isinstance(entry.message, MhcWarning))
    return replace(result, warnings=tuple(told))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = dtype in (None, *_DTYPES, *_DTYPES.values())
    if not known:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype] if isinstance(dtype, str) else dtype


def _cast(model: Any, dtype: torch.dtype | None) -> Any:
    from copy import deepcopy

    return model if dtype is None else deepcopy(model).to(dtype)


def _inputs(args: Any, kwargs: Any, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (tuple(args), dict(kwargs)) if dtype is None else (cast(tuple(args), dtype), cast(dict(kwargs), dtype))


def _repeatable(options: ResolvedOptions) -> ResolvedOptions:
    """With random numbers drawn as eager draws them: Inductor's own are others."""
    return (
        replace(options, inductor={"fallback_random": True, **options.inductor})
        if options.inner_backend == "inductor"
        else options
    )


def _preserving(options: ResolvedOptions) -> ResolvedOptions:
    try:
        return replace(options, init="preserve")
    except OptionError as error:
        raise OptionError(
            f"check compares the rewritten model with the plain one, and with these options they never compute the same: {error}"
        ) from None


class _Proof:
    """One check, step by step; `run` is the table of contents."""

    def __init__(
        self,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: ResolvedOptions,
        seed: int,
        tolerance: float | None,
    ) -> None:
        self.subject: Subject = subject_of(model, options)
        self.mode = ("train" if model.training else "eval") if isinstance(model, nn.Module) else "exported"
        self.args, self.kwargs, self.options, self.seed = args, kwargs, options, seed
        self.strict = tolerance is not None
        self.tolerance = tolerance_of(self.subject.dtype) if tolerance is None else tolerance
        self.differentiable = True
        self.wider = ""

    def run(self) -> CheckResult:
        want, plain_seconds = self._plain()
        try:
            planned = self.subject.plan(self.args, self.kwargs)
        except CaptureError as error:  # a dry run has no values: what it cannot trace may compile all the same
            planned = None
            warn(f"no dry run, so that the number of sites is not known: {error}")
        side = self.subject.rewritten(_preserving(self.options))
        buffers = _Buffers(side.module)
        started = time.perf_counter()
        got = self._compiled(side)
        first = time.perf_counter() - started
        if side.graphs > 1:  # the two halves of a branch that a graph break cuts work together from the second call on
            buffers.restore()
            got = self._compiled(side)
        compared = self._differences(got, want, lambda: self._exactly(self.subject.plain, self.args, self.kwargs))
        graphs = side.graphs
        for _ in range(_FURTHER_CALLS):
            buffers.restore()
            started = time.perf_counter()
            self._compiled(side)
            compiled_seconds = time.perf_counter() - started
        recompiles = side.graphs - graphs
        sites = len(side.connections())
        other, more = self._other_batch(side, buffers)
        live, alive = self._live(side, buffers) if sites else (set(), [])
        return CheckResult(
            model=self.subject.name,
            mode=self.mode,
            dtype=_name(self.subject.dtype),
            inner_backend=self.options.inner_backend
            if isinstance(self.options.inner_backend, str)
            else getattr(self.options.inner_backend, "__name__", "callable"),
            seed=self.seed,
            tolerance=self.tolerance,
            planned=planned[0] if planned is not None else sites,
            sites=sites,
            live=len(live),
            graphs=graphs,
            recompiles=recompiles,
            other_batch=other,
            own=self.subject.attached,
            wider=self.wider,
            tensors=(*compared, *more, *alive),
            warnings=(),
            seconds=Seconds(plain_seconds, first, compiled_seconds),
        )

    def _plain(self) -> tuple[Observation, float]:
        """The plain model's pass, and how long a second one takes."""
        side = self.subject.plain()
        try:
            want = self._observe(side)
        except Exception:
            self.differentiable = False  # a model that writes into its inputs cannot be asked for their gradients
            try:
                side = self.subject.plain()
                want = self._observe(side)
            except Exception as error:
                shown = ", ".join(
                    f"{name} {list(value.shape)}" for name, value in tensors((self.args, self.kwargs), "input")
                )
                raise CaptureError(
                    f"{self.subject.name} itself does not run with the example inputs ({shown or 'none'}): {_line(error)}"
                ) from error
        nan = [
            name for values in (want.outputs, want.gradients) for name, value in values.items() if value.isnan().any()
        ]
        if nan:
            raise CaptureError(
                f"{self.subject.name} itself gives NaN in {', '.join(nan[:3])}: there is nothing to compare with. Choose other example inputs"
            )
        started = time.perf_counter()
        self._observe(self.subject.plain())
        return want, time.perf_counter() - started

    def _observe(self, side: Side, args: Any = None, kwargs: Any = None) -> Observation:
        return observe(
            side.call,
            side.module,
            self.args if args is None else args,
            self.kwargs if kwargs is None else kwargs,
            differentiable_inputs=self.differentiable,
            seed=self.seed,
        )

    def _compiled(self, side: Side, args: Any = None, kwargs: Any = None) -> Observation:
        try:
            return self._observe(side, args, kwargs)
        except MhcError:
            raise
        except Exception as error:
            raise CaptureError(f"{self.subject.name} runs, and the compiled one does not: {_line(error)}") from error

    def _differences(self, got: Observation, want: Observation, exactly: Any, prefix: str = "") -> list[Difference]:
        """Every tensor; where one deviates, the plain model is run in a wider dtype, which may excuse it."""
        found = list(differences(got, want, self.tolerance, prefix=prefix))
        if self.strict or all(one.ok for one in found):
            return found
        exact = exactly()
        if exact is None:
            return found
        self.wider = _name(_WIDER[self.subject.dtype])
        return list(differences(got, want, self.tolerance, exact=exact, dtype=self.subject.dtype, prefix=prefix))

    def _exactly(self, make: Any, args: Any, kwargs: Any) -> Observation | None:
        """The pass of a side in a wider dtype, if there is one and it runs."""
        dtype = _WIDER.get(self.subject.dtype)
        if dtype is None:
            return None
        try:
            return self._observe(make(dtype), cast(args, dtype), cast(kwargs, dtype))
        except Exception:  # a dtype that is written into the model
            return None

    def _other_batch(self, side: Side, buffers: _Buffers) -> tuple[OtherBatch | None, list[Difference]]:
        doubled = _doubled(self.args, self.kwargs)
        if doubled is None:
            return None, []
        size, args, kwargs = doubled
        try:
            want = self._observe(self.subject.plain(), args, kwargs)
        except Exception:  # the model is made for the size of the examples
            return None, []
        before = side.graphs
        buffers.restore()
        got = self._compiled(side, args, kwargs)
        found = self._differences(got, want, lambda: self._exactly(self.subject.plain, args, kwargs), f"batch {size}: ")
        return OtherBatch(size, side.graphs - before), found

    def _live(self, side: Side, buffers: _Buffers) -> tuple[set[str], list[Difference]]:
        """The sites that take part, and the model with parameters far from the start, beside itself from another compiler."""
        if self.subject.attached:
            side = self.subject.rewritten(self.options, own=True)
            buffers = _Buffers(side.module)
            self._compiled(side)
        else:
            randomize([*side.connections().values(), *side.read_outs()], self.seed)
        buffers.restore()
        twin = self.subject.other(side, self.options)
        got = self._settled(side)
        want = self._settled(twin)
        compared = self._differences(
            got,
            want,
            lambda: self._exactly(lambda dtype: self._wide_twin(side, buffers, dtype), self.args, self.kwargs),
            "live: ",
        )

        def outputs() -> dict[str, Tensor]:
            buffers.restore()
            return self._compiled(side).outputs

        return live_sites(side.connections(), got.gradients, outputs), compared

    def _settled(self, side: Side) -> Observation:
        """The pass of a rewritten side, once both halves of its branches know each other."""
        buffers = _Buffers(side.module)
        self._compiled(side)
        buffers.restore()
        return self._compiled(side)

    def _wide_twin(self, side: Side, buffers: _Buffers, dtype: torch.dtype) -> Side:
        buffers.restore()
        twin = self.subject.other(side, self.options, dtype)
        wide = _Buffers(twin.module)
        self._observe(twin, cast(self.args, dtype), cast(self.kwargs, dtype))
        wide.restore()
        return twin


class _Buffers:
    """The buffers of a module as they were, to be put back before another call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = {name: value.detach().clone() for name, value in module.named_buffers()}

    def restore(self) -> None:
        """Writes the values into the module's buffers."""
        with torch.no_grad():
            for name, value in self._module.named_buffers():
                if name in self._values and value.shape == self._values[name].shape:
                    value.copy_(self._values[name])


def _doubled(args: Any, kwargs: Any) -> tuple[int, Any, Any] | None:
    """The inputs with every tensor twice along its first axis, and the new size; None unless all have the same size there."""
    sizes = {value.shape[0] if value.dim() else -1 for _, value in tensors((args, kwargs), "input")}
    if len(sizes) != 1 or sizes <= {-1, 0}:
        return None

    def twice(value: Tensor) -> Tensor:
        return torch.cat([value, value])

    return 2 * sizes.pop(), map_tensors(args, twice), map_tensors(kwargs, twice)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
