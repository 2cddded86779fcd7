"""`HyperConnection`: the parameters of one site, and their use by hand."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import ops as _ops  # noqa: F401 - registers the operators
from mhc_compile._torch import state_metadata
from mhc_compile.config.coefficient_spec import parse
from mhc_compile.config.options import Options
from mhc_compile.errors import OptionError, warn
from mhc_compile.mappings import get_mapping
from mhc_compile.modules.readout import ReadOut
from mhc_compile.modules.state_dict import NAMES, SETTINGS, Load, LoadsPartially, guess_options, saved_speeds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

#: Logit of the only pre weight when n = 1, where `sum(pre) = 1` is a saturated sigmoid: 1 - 1.1e-7.
_SATURATED = 16.0

#: All hyper-connections of the process, weak.
_living: weakref.WeakSet[HyperConnection] = weakref.WeakSet()
#: Several threads may build models at the same time.
_lock = threading.Lock()


def living() -> list[HyperConnection]:
    """Return all hyper-connections of the process, copies included."""
    with _lock:
        return list(_living)


def parameter_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype of a site's parameters: float64 for a float64 trunk value, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


class HyperConnection(LoadsPartially):
    """A residual add as a hyper-connection: `X' = H_res X + H_postᵀ f(H_pre X)`.

    Source: arXiv 2512.24880 v2, equations 5 to 9, or the preset. Shapes, with `K = 2 n + n²` for
    Sinkhorn and streams [..., n, C]:

        phi    [n C, K]   projection of the flattened, rms-normalised streams; columns pre (n),
                          post (n), residual (n², row-major)
        bias   [K]        static logits
        scale  [3]        a_pre, a_post, a_res

    Logits are `scale_speed a z + gate_speed b`: bias and scale are the paper's divided by their
    `speeds`. Those of other speeds are converted when a state dict is loaded. The gradient of bias
    is the paper's, not multiplied by the speed, so that it is a factor of the learning rate and
    nothing else.

    With token_dependent=False phi is [n C, 0] and scale [0]: coefficients depend on bias alone.
    Coefficients are computed in float32 or wider, whatever the dtype of the streams.

    A state dict without hyper-connections, that of a plain model, is loaded with a warning, and the
    parameters here do not change; one with only some of them, or with other shapes, is an error
    (see `mhc_compile.load_state_dict`).

    Args:
        width: C, the width of the residual stream.
        options: number of streams, mapping, init and so on; defaults to `Options()`.
        index: position of the site in its chain. With init="preserve" the branch leans to stream
            `index mod n`.
        last: whether the site ends its chain. With read_out="learned" it then has a submodule
            `read_out`, a `ReadOut`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        OptionError: `width` is not a positive integer.
    """

    names: tuple[str, str, str] = NAMES

    phi: nn.Parameter
    bias: nn.Parameter
    scale: nn.Parameter

    #: Of modules that an earlier version pickled.
    gate_speed: float = 1.0
    scale_speed: float = 1.0
    function: str = "of an earlier version"

    def __new__(cls, *args: Any, **settings: Any) -> Self:  # noqa: ARG004 - those of `__init__`
        """Return a new instance. Copies and unpickled ones are made here, without `__init__`."""
        connection = super().__new__(cls)
        with _lock:
            _living.add(connection)
        return connection

    def __init__(
        self,
        width: int,
        options: Options | None = None,
        *,
        index: int = 0,
        last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise OptionError(
                f"HyperConnection: width is {width!r}; expected a positive integer, the size of the feature axis"
            )
        options = Options.parse(options)
        self.width = width
        self.streams = options.streams
        self.index = index
        self.preset = options.preset
        self.spec = options.spec
        self.mapping = options.mapping
        self.iterations = options.iterations
        self.eps = options.eps
        self.token_dependent = options.token_dependent
        self.rank = options.rank
        self.single_pass = options.single_pass
        self.end = options.read_out
        self.init = options.init
        self.gate_speed, self.scale_speed = options.speeds
        #: What graphs have as constants: one compiled for other settings computes something else.
        self.function = f"{self.spec}, {self.iterations}, {self.eps}, {self.end}, {self.single_pass}"
        self._init_gain = options.init_gain
        self._init_stream_weight = options.init_stream_weight
        self._create(device=device, dtype=dtype)
        self.read_out: ReadOut | None = None
        if last:
            self.end_chain()
        self.reset_parameters()

    def _create(self, **empty: Any) -> None:
        n = self.streams
        columns = 2 * n + get_mapping(self.mapping).logits(n)
        self.phi = nn.Parameter(torch.empty(n * self.width, columns if self.token_dependent else 0, **empty))
        self.bias = nn.Parameter(torch.empty(columns, **empty))
        self.scale = nn.Parameter(torch.empty(3 if self.token_dependent else 0, **empty))

    @property
    def speeds(self) -> dict[str, float]:
        """Return what bias and scale are multiplied by in logits."""
        return {"bias": self.gate_speed, "scale": self.scale_speed}

    @property
    def lacks_end(self) -> bool:
        """Whether the learned read-out is missing that the last site of this chain needs."""
        return self.end == "learned" and not self.single_pass and self.read_out is None

    def end_chain(self) -> bool:
        """Add the learned read-out if the options ask for one; return whether it was missing."""
        if not self.lacks_end:
            return False
        like = {"device": self.phi.device, "dtype": self.phi.dtype}
        settings = {"spec": self.spec, "eps": self.eps, "init": self.init, "init_gain": self._init_gain}
        self.read_out = ReadOut(self.width, self.streams, **settings, **like)  # type: ignore[arg-type]
        return True

    def start(self) -> dict[str, Tensor]:
        """Return the start of every parameter, whole and on the CPU, as the options say.

        "preserve": phi = 0, scale > 0, pre sums to 1 and leans to one stream, post = 1, H_res near
        the identity. With equal streams this is the plain residual add, in value and in every
        gradient of the original parameters, and phi receives a gradient from the first step.
        "random": phi ~ N(0, 1/(n C)), so that `z` has unit variance; bias 0, hence pre = 1/2, post
        = 1 and uniform mixing (under "unconstrained" the identity).
        """
        n, convention = self.streams, parse(self.spec)
        phi = torch.zeros(self.phi.shape, dtype=self.phi.dtype)
        bias = torch.zeros(self.bias.shape, dtype=torch.float64)
        scale = torch.full(self.scale.shape, self._init_gain, dtype=torch.float64)
        if self.init == "random":
            phi.normal_(std=(n * self.width) ** -0.5)
            bias[2 * n :] = get_mapping(self.mapping).init_random(n)
        else:
            if n == 1:
                bias[0] = _SATURATED
            else:
                weights = torch.full((n,), (1.0 - self._init_stream_weight) / (n - 1), dtype=torch.float64)
                weights[self.index % n] = self._init_stream_weight
                bias[:n] = torch.logit(weights - convention.pre_eps)
            post = torch.tensor((1.0 - convention.post_eps) / convention.post_range, dtype=torch.float64)
            bias[n : 2 * n] = torch.logit(post)
            bias[2 * n :] = get_mapping(self.mapping).init_preserve(n)
        return {"phi": phi, "bias": bias / self.speeds["bias"], "scale": scale / self.speeds["scale"]}

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(pre [..., n], post [..., n], res [..., n, n])` for streams [..., n, C].

        Raises:
            ShapeError: the streams do not fit n and C.
        """
        pre, post, res, _ = torch.ops.mhc.coefficients(
            streams, self.phi, self.bias, self.scale, self.spec, self.iterations, self.eps
        )
        return pre, post, res

    def forward(self, streams: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return new streams [..., n, C]; `branch` is a function of [..., C]."""
        pre, post, res = self.coefficients(streams)
        out = branch(torch.ops.mhc.collapse(streams, pre))
        return torch.ops.mhc.update(streams, out, post, res)  # type: ignore[no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = state_metadata(destination)
        if metadata is not None:
            metadata.setdefault(prefix.removesuffix("."), {}).update({name: getattr(self, name) for name in SETTINGS})

    def converted(self, state: Mapping[str, Any], prefix: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return `state` with bias and scale for the speeds here; `settings` were saved with it.

        Without settings, which safetensors files do not keep, values are taken as they are.
        """
        saved = saved_speeds(settings, self.speeds)
        ratios = {prefix + name: saved[name] / speed for name, speed in self.speeds.items() if name in self.names}
        if set(ratios.values()) <= {1.0} or not all(isinstance(state.get(key), Tensor) for key in ratios):
            return state
        return {**state, **{key: state[key] * ratio for key, ratio in ratios.items()}}

    def _check_loaded(
        self, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], errors: list[str], load: Load
    ) -> None:
        """Explain the tensors of `state` that do not fit, and warn of non-finite values.

        `metadata` are the saved `SETTINGS`; `errors`, torch's so far, are changed in place.
        """
        path = prefix.removesuffix(".")
        shapes = {name: (tuple(state[prefix + name].shape), tuple(getattr(self, name).shape)) for name in self.names}
        wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
        if wrong:
            # Replaces torch's sentence for each tensor by one that says how to mend it.
            errors[:] = [
                error for error in errors if not any(f"size mismatch for {prefix}{name}:" in error for name in wrong)
            ]
            listed = ", ".join(
                f"{prefix}{name} {list(has)} instead of {list(wants)}" for name, (has, wants) in wrong.items()
            )
            errors.append(
                f"the state dict has {listed} (width {self.width}, streams {self.streams}, mapping"
                f" {self.mapping!r}).{load.once(self._way_out(shapes['phi'][0], set(wrong)))}"
            )
        for name in self.names:
            if not _is_finite(state[prefix + name]):
                warn(
                    f"{prefix}{name} has values in the state dict that are not finite: the run that wrote it had diverged,"
                    " or the file is damaged"
                )
        for name in SETTINGS:
            has, wants = metadata.get(name, getattr(self, name)), getattr(self, name)
            if (
                has == wants
                or wrong
                or name in ("gate_speed", "scale_speed")
                or (name == "iterations" and not get_mapping(self.mapping).iterative)
            ):
                continue
            sentence = (
                f"was saved with {name}={has!r} and is loaded into one with {name}={wants!r}: the same parameters, another"
                f" function. Attach and compile with options={{{name!r}: {has!r}}} for the function that was saved"
            )
            if name == "mapping":
                errors.append(f"hyper-connection {path!r} {sentence}.")
            elif load.once(sentence):
                warn(f"hyper-connection {path!r} (and perhaps others) {sentence}")

    def _way_out(self, phi: tuple[int, ...], wrong: set[str]) -> str:
        if "phi" in wrong:
            guesses = guess_options(phi)
            guesses.sort(key=lambda guess: guess[1] != self.mapping)
            for streams, mapping, width in guesses:
                if width != self.width:
                    continue
                pairs = {"streams": (streams, self.streams), "mapping": (mapping, self.mapping)}
                differing = {name: has for name, (has, mine) in pairs.items() if has != mine}
                made = ", ".join(f"{name}={value!r}" for name, value in differing.items())
                return f"The checkpoint was made with {made}: attach and compile with options={differing!r}."
            likeliest: dict[tuple[int, int], str] = {}  # not every mapping that looks like another one
            for streams, mapping, width in guesses:
                likeliest.setdefault((width, streams), mapping)
            others = [f"width {width} (streams={n}, mapping={mapping!r})" for (width, n), mapping in likeliest.items()]
            if others:
                return f"The checkpoint is of a model of {' or '.join(others)}, this one has width {self.width}."
        return "No choice of options gives these shapes: the checkpoint is damaged, or of something else."

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        static = "" if self.token_dependent else ", static"
        return f"width={self.width}, streams={self.streams}, mapping={self.spec}, iterations={self.iterations}{static}"


def _is_finite(value: Tensor) -> bool:
    # The values of fake, distributed and other special tensors are not read.
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta
    return not plain or bool(torch.isfinite(value).all())
