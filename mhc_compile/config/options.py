"""The options of the backend, one frozen and validated value. Torch-free."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from mhc_compile.config.coefficient_spec import MAX_STREAMS, STREAM_COUNTS
from mhc_compile.config.presets import ReadOut, gate_speed, get_preset, scale_speed
from mhc_compile.errors import OptionError

Init = Literal["preserve", "random"]
ExistingOptimizers = Literal["extend", "warn", "ignore"]
Recompute = Literal["none", "cheap", "block"]
InnerBackend = Literal["inductor", "aot_eager", "eager"]
OutsideCalls = Literal["eager", "error"]

#: The options that `overrides` may set; the others hold for a whole chain or compilation.
PER_SITE = (
    "mapping", "token_dependent", "iterations", "init", "init_gain", "init_stream_weight", "gate_speed", "scale_speed",
    "eps",
)  # fmt: skip


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        hint = f"; {_nearest(value, list(known))}" if isinstance(value, str) else f" ({type(value).__name__}); "
        raise OptionError(f"option {name!r} is {value!r}{hint}expected one of {', '.join(map(repr, known))}")


def _number(name: str, value: object, kind: type, low: float, high: float, unit: str) -> None:
    # bool is an int to Python, and streams=True is a mistake.
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if isinstance(value, bool) or not right:
        raise OptionError(f"option {name!r} is {value!r} ({type(value).__name__}); expected {unit}")
    if not low <= value <= high:  # type: ignore[operator]
        raise OptionError(f"option {name!r} is {value!r}; expected {unit}")


def _counts(counts: tuple[int, ...]) -> str:
    if counts == tuple(range(counts[0], counts[-1] + 1)):
        return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `torch.compile(model, backend="mhc", options={...})` accepts.

    Attributes:
        preset: whose convention: "paper", "deepseek-v4", "deepseek-v4.1", "glm5-next", "hy-v4",
            "liger", "qwen4-exp", or one of your own (see `mhc_compile.config.presets`). It chooses
            mapping, iterations, eps, read_out, single_pass, rank, init_gain, gate_speed and
            scale_speed where they are not given, and the epsilons in the coefficients.
        streams: n, the number of residual streams, 1 to 8.
        mapping: the family of H_res: "sinkhorn" (the paper's), "identity" (streams are not mixed),
            "permutations" (mHC-lite, up to 4 streams), "kronecker" (KromHC, 1, 2, 4 or 8 streams),
            "unconstrained" (HC, for comparison), or one of your own
            (`mhc_compile.register_mapping`).
        token_dependent: whether coefficients depend on the token, through phi. False: they are the
            same for all tokens (static hyper-connections).
        overrides: options of some sites, by a pattern for the path of the branch: {"layers.*.mlp":
            {"mapping": "identity"}}. `*` stands for any characters, and anything may stand before
            the pattern ("model.layers.0.mlp" fits too). A later pattern goes before an earlier one.
            It takes mapping, token_dependent, iterations, init, init_gain, init_stream_weight,
            gate_speed, scale_speed and eps.
        read_out: what ends a chain: "mean", "sum", or "learned", a sum with weights that depend on
            the token. Other readers of a trunk value get the sum with "sum", else the mean.
        single_pass: the weights that a site computes collapse the streams for the next site, the
            first one reads the trunk itself, and the weights of the last one end the chain
            (DeepSeek-V4.1).
        rank: rank of the gate by which a branch reads every channel with a weight of its own
            (Qwen4-Exp), 0 for none.
        iterations: Sinkhorn iterations, 1 to 1000 (20 in the paper). Ignored by other mappings.
        init: "preserve" starts as the same function as the model given: the streams are equal,
            every branch reads their weighted mean and writes to all of them. "random" starts from
            random projections and uniform mixing, for training from the first step; it changes what
            the model computes.
        init_gain: initial value of a_pre, a_post and a_res, 0.01 in the paper. Positive: at 0, with
            phi = 0, nothing would ever learn.
        init_stream_weight: with init="preserve", the weight that a branch gives to one stream (site
            i of a chain leans to stream i mod n); the others share the rest. Equal weights would
            keep the streams equal for ever.
        gate_speed: how many times faster than by its learning rate AdamW moves logits by b: s in
            `c a z + s b`. None: for preset "paper", or one of your own that gives none, 32 with
            init="preserve" and a mapping that bounds H_res; else 1, the paper's. A checkpoint has
            b / s; a state dict of another speed is converted when it is loaded. The gradient of b
            is 1 / s of the derivative, as if s were 1, so that clipping sees no change.
        scale_speed: c, by which a moves slower than by the learning rate. None: for preset "paper",
            or one of your own that gives none, 1/128 with init="preserve", which moves a by lr in
            units of about its start; else 1, the paper's. A checkpoint has a / c, and is converted
            likewise.
        eps: added to the mean square under the root mean square of the streams.
        min_chain_length: a chain of fewer residual adds is left as it is.
        strict: an error instead of a warning where nothing is rewritten, a rewrite fails, streams
            are lost between graphs, or no optimizer trains the parameters.
        recompute: what the backward computes again instead of keeping it. "cheap": all but the
            streams before every site, the outputs of the branches and the coefficients; it costs
            nothing, because the kernels have what they need at hand. The streams of every fourth
            site only (CUDA: third) are kept, or written at all: the others are a combination of
            those and of the outputs since (`passes.LazyStreams`). "block": all but the streams of
            every `sqrt(n L / (n + 2))`-th of L sites and the outputs; costs about one more forward
            of the hyper-connections, no branch runs again. "none": the operators stay apart, and
            each keeps what it was given; for comparison. With `inner_backend` "inductor" or
            "aot_eager".
        inner_backend: the compiler that receives the rewritten graph: "inductor", "aot_eager",
            "eager", or any callable that is a `torch.compile` backend.
        existing_optimizers: what to do for an optimizer that was built before the first call and so
            has never seen the new parameters: "extend" adds them to the groups of the block that
            they belong to, "warn" only says so, "ignore" does nothing.
        outside_calls: what a call outside `torch.compile` does with the model: "eager" runs its
            hyper-connections operation by operation, "error" raises OutsideCallError.
        inductor: further settings for Inductor, as in `torch.compile(options=...)` (e.g.
            {"max_autotune": True}).
    """

    preset: str = "paper"
    streams: int = 4
    mapping: str | None = None
    token_dependent: bool = True
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    read_out: ReadOut | None = None
    single_pass: bool | None = None
    rank: int | None = None
    iterations: int | None = None
    init: Init = "preserve"
    init_gain: float | None = None
    init_stream_weight: float = 0.7
    gate_speed: float | None = None
    scale_speed: float | None = None
    eps: float | None = None
    min_chain_length: int = 2
    strict: bool = False
    recompute: Recompute = "cheap"
    inner_backend: InnerBackend | Callable[..., Any] = "inductor"
    existing_optimizers: ExistingOptimizers = "extend"
    outside_calls: OutsideCalls = "eager"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in self.names()}
        chosen = get_preset(self.preset).defaults()
        values: dict[str, Any] = {n: chosen.get(n) if value is None else value for n, value in given.items()}
        object.__setattr__(self, "_resolved", ResolvedOptions(**values))

    @property
    def resolved(self) -> ResolvedOptions:
        """Return these options with the choices of the preset filled in."""
        return self._resolved  # type: ignore[attr-defined, no-any-return]

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options."""
        return [f.name for f in fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; an `inner_backend` that is a function by its name."""
        values = {name: getattr(self, name) for name in self.names()}
        if callable(self.inner_backend):
            values["inner_backend"] = getattr(self.inner_backend, "__name__", "callable")
        overrides = {pattern: dict(options) for pattern, options in self.overrides.items()}
        return {**values, "inductor": dict(self.inductor), "overrides": overrides}

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None) -> ResolvedOptions:
        """Validate the `options` of `torch.compile` and fill in the choices of the preset.

        Raises:
            OptionError: an unknown name (the message gives the nearest known one), a wrong type, or
                a value out of range.
        """
        if options is None:
            return cls().resolved
        if isinstance(options, Options):
            return options.resolved
        if not isinstance(options, Mapping):
            raise OptionError(
                f"options are {options!r} ({type(options).__name__}); expected a dict such as {{'streams': 4}}"
            )
        known = cls.names()
        for name in options:
            if name not in known:
                hint = _nearest(str(name), known)
                raise OptionError(
                    f"option {name!r} is unknown; {hint}known options: {', '.join(known)}."
                    " Settings for Inductor go under 'inductor': {...}"
                )
        return cls(**options).resolved


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(Options):
    """Options in which the user or the preset has chosen every value; see `Options.parse`.

    `gate_speed` and `scale_speed` may still be None, for those of the site's mapping and start;
    `speeds` are the numbers.
    """

    mapping: str
    read_out: ReadOut
    single_pass: bool
    rank: int
    iterations: int
    init_gain: float
    eps: float

    def __post_init__(self) -> None:
        get_preset(self.preset)
        _number("streams", self.streams, int, 1, MAX_STREAMS, f"an integer from 1 to {MAX_STREAMS}")
        _one_of("mapping", self.mapping, tuple(STREAM_COUNTS))
        _one_of("read_out", self.read_out, get_args(ReadOut))
        _number("rank", self.rank, int, 0, 1_000_000, "an integer from 0, which means no gate")
        _number("iterations", self.iterations, int, 1, 1000, "an integer from 1 to 1000")
        _one_of("init", self.init, get_args(Init))
        learns = "a number from 1e-8 to 100 (at 0 the projections would never learn)"
        _number("init_gain", self.init_gain, float, 1e-8, 100.0, learns)
        for name in ("gate_speed", "scale_speed"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), float, 1e-3, 1e3, "a number from 0.001 to 1000")
        _number("init_stream_weight", self.init_stream_weight, float, 1e-3, 0.999, "a number from 0.001 to 0.999")
        _number("eps", self.eps, float, 0.0, 1.0, "a number from 0 to 1")
        _number("min_chain_length", self.min_chain_length, int, 1, 1_000_000, "a positive integer")
        for name in ("strict", "token_dependent", "single_pass"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise OptionError(f"option {name!r} is {value!r} ({type(value).__name__}); expected True or False")
        _one_of("recompute", self.recompute, get_args(Recompute))
        if not callable(self.inner_backend):
            _one_of("inner_backend", self.inner_backend, get_args(InnerBackend))
        _one_of("existing_optimizers", self.existing_optimizers, get_args(ExistingOptimizers))
        _one_of("outside_calls", self.outside_calls, get_args(OutsideCalls))
        if not isinstance(self.inductor, Mapping):
            raise OptionError(
                f"option 'inductor' is {self.inductor!r} ({type(self.inductor).__name__}); expected a dict of Inductor settings"
            )
        self._check_together()
        self._check_overrides()

    @property
    def resolved(self) -> ResolvedOptions:
        """Return these options."""
        return self

    def _check_together(self) -> None:
        """Reject combinations whose parts are each allowed."""
        counts = STREAM_COUNTS[self.mapping]
        if self.streams not in counts:
            raise OptionError(
                f"mapping {self.mapping!r} has no matrices for {self.streams} streams, only for {_counts(counts)};"
                " choose another 'streams', or mapping 'sinkhorn'"
            )
        if self.init == "preserve":
            if self.rank or not get_preset(self.preset).preserves:
                raise OptionError(
                    f"preset {self.preset!r}: with rank={self.rank} a branch reads normalised streams, and no parameters make that the plain"
                    " residual add. Add init='random' to train from a random start, or choose another preset"
                )
            if self.read_out == "sum" and self.streams > 1:
                raise OptionError(
                    f"read_out='sum' adds {self.streams} equal streams up at the start, {self.streams} times what the plain model computes. Use"
                    " read_out='mean', or init='random'"
                )
        if self.rank and (self.mapping != "identity" or not self.token_dependent):
            raise OptionError(
                f"rank={self.rank} reads every channel with a weight of its own, which goes with mapping='identity' and token_dependent=True; got"
                f" mapping={self.mapping!r} and token_dependent={self.token_dependent}"
            )
        if self.rank and self.speeds != (1, 1):
            raise OptionError(
                f"gate_speed={self.speeds[0]} and scale_speed={self.speeds[1]} are factors in logits c a z + s b, and with"
                f" rank={self.rank} there are none: leave them out"
            )
        if self.single_pass and self.rank:
            raise OptionError(
                "single_pass=True needs one weight a stream, and rank > 0 gives one a channel: choose one"
            )

    def _check_overrides(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise OptionError(
                f"option 'overrides' is {self.overrides!r} ({type(self.overrides).__name__}); expected a dict such as"
                " {'layers.*.mlp': {'mapping': 'identity'}}"
            )
        for pattern, values in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(values, Mapping):
                raise OptionError(
                    f"option 'overrides': {pattern!r}: {values!r}; expected a pattern and a dict of options"
                )
            for name in values:
                if name not in PER_SITE:
                    hint = _nearest(str(name), list(PER_SITE))
                    raise OptionError(
                        f"option 'overrides': {pattern!r} sets {name!r}; {hint}for single sites there are: {', '.join(PER_SITE)}"
                    )
            try:
                replace(self, overrides={}, **values)
            except OptionError as error:
                raise OptionError(f"option 'overrides': {pattern!r}: {error}") from None

    def at(self, path: str) -> ResolvedOptions:
        """Return the options for the site whose branch, or hyper-connection, has this path."""
        values: dict[str, Any] = {}
        for pattern in self.matching(path):
            values.update(self.overrides[pattern])
        return replace(self, overrides={}, **values) if values else self

    def matching(self, path: str) -> list[str]:
        """Return the patterns of `overrides` that fit `path`, or the end of it."""
        branch = path.replace(".mhc.", ".").removeprefix("mhc.")
        return [
            pattern
            for pattern in self.overrides
            if fnmatch.fnmatchcase(branch, pattern) or fnmatch.fnmatchcase(branch, f"*.{pattern}")
        ]

    @property
    def speeds(self) -> tuple[float, float]:
        """Return `gate_speed` and `scale_speed`, or the defaults for mapping and start."""
        static = gate_speed(self.gate_speed, self.init, self.mapping)
        return float(static), float(scale_speed(self.scale_speed, self.init))

    @property
    def spec(self) -> str:
        """Return the convention of the coefficients as a string, as the operators take it."""
        convention = get_preset(self.preset).convention
        static, gain = self.speeds
        return str(replace(convention, mapping=self.mapping, rank=self.rank, gate_speed=static, scale_speed=gain))
