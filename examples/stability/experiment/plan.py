"""The plan: variants, learning rates, seeds, sizes, and files of results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.config.presets import GATE_SPEED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Files of the runs that were trained again, and of the measurement of cost.
AGAIN, COST = "again.json", "cost.json"
#: The variant that the others are compared with, apart from plain: what `backend="mhc"` does.
DEFAULT = "mHC"


@dataclass(frozen=True)
class Variant:
    """What is done to the decoder.

    Attributes:
        label: in tables.
        options: of the backend; None for a model without hyper-connections.
        scalars: every residual add is `a x + b f(x)` with two learned numbers, which begin at 1.
        gate_decay: weight decay of bias and scale, in an optimizer group of their own.
        plain_part: part of the steps for which the plain model is trained, before it gets its
            hyper-connections.
    """

    label: str
    options: dict[str, Any] | None = None
    scalars: bool = False
    gate_decay: float = 0.0
    plain_part: float = 0.0

    def decided(self) -> dict[str, Any]:
        """Return what decides the numbers of a run, with the defaults of today filled in."""
        if self.options is None:
            return {}
        options = Options.parse(self.options)
        names = ("streams", "token_dependent", "read_out", "single_pass", "iterations")
        names += ("init", "init_gain", "init_stream_weight", "eps")
        return {"convention": options.spec, **{name: getattr(options, name) for name in names}}


def _mhc(label: str, **settings: Any) -> Variant:
    own = {name: settings.pop(name) for name in ("gate_decay", "plain_part") if name in settings}
    return Variant(label, settings, **own)


#: The paper's parameters: AdamW moves all of them by the learning rate.
_PAPER: dict[str, Any] = {"gate_speed": 1.0, "scale_speed": 1.0}

#: By name. The slowest first: two processes then end together.
VARIANTS: dict[str, Variant] = {
    "permutations": _mhc("permutations", mapping="permutations"),
    "HC": _mhc("HC (unconstrained), the paper's speeds, a = 0.3", mapping="unconstrained", init_gain=0.3, **_PAPER),
    "HC-fast": _mhc("HC (unconstrained), the default's speeds", mapping="unconstrained", gate_speed=GATE_SPEED),
    "mHC": _mhc("mHC (sinkhorn, the default)"),
    "scale1": _mhc("mHC, scale_speed=1", scale_speed=1.0),
    "gain0.04": _mhc("mHC, init_gain=0.04", init_gain=0.04),
    "paper": _mhc("mHC, the paper's speeds", **_PAPER),
    "gain0.3": _mhc("mHC, the paper's speeds, a = 0.3", init_gain=0.3, **_PAPER),
    "gain1": _mhc("mHC, the paper's speeds, a = 1", init_gain=1.0, **_PAPER),
    "decay": _mhc("mHC, weight decay on bias and scale", gate_decay=0.1),
    "lean0.4": _mhc("mHC, init_stream_weight=0.4", init_stream_weight=0.4),
    "lean0.9": _mhc("mHC, init_stream_weight=0.9", init_stream_weight=0.9),
    "learned": _mhc("mHC, read_out='learned'", read_out="learned"),
    "single-pass": _mhc("mHC, single_pass=True", single_pass=True),
    "attached": _mhc("mHC, attached to the plain model half-way", plain_part=0.5),
    "static": _mhc("mHC, token_dependent=False", token_dependent=False),
    "static-paper": _mhc("mHC, the paper's speeds, token_dependent=False", token_dependent=False, **_PAPER),
    "n2": _mhc("mHC, streams=2", streams=2),
    "kronecker": _mhc("kronecker", mapping="kronecker"),
    "identity": _mhc("identity", mapping="identity"),
    "scalars": Variant("one stream, a x + b f(x)", scalars=True),
    "plain": Variant("plain"),
}


def has_streams(variant: str) -> bool:
    """Return whether the variant has hyper-connections."""
    return VARIANTS[variant].options is not None


class ExperimentError(Exception):
    """A problem that the user must solve; the message says how."""


@dataclass(frozen=True)
class Run:
    """One training run: a variant, a learning rate, a seed."""

    variant: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.rate:g}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of the experiment.

    Attributes:
        variants: names of `VARIANTS`, in the order of the tables.
        rates: peaks of the learning rate.
        seeds: number of seeds; a seed decides initial weights and batches, the same for all
            variants.
        steps, batch, length: steps of a run, sequences a step, bytes a sequence. layers, width,
        heads: of the decoder; a layer has two residual adds. embedding: deviation of the initial
        embedding of a byte. weights: deviation of the initial weights of linear layers, times
        sqrt(width). clip: largest gradient norm; 1e6 is any. warm_up: steps over which the learning
        rate rises.
        measured: validations and measurements of the gain in a run, evenly spread, the last one at
        its end. held_out: batches of the last validation; the others take an eighth of them.
        rounds: of the measurement of cost. inner: the compiler of all variants: "inductor",
        "aot_eager" or "eager".
    """

    variants: tuple[str, ...] = (
        "plain", "scalars", "paper", "gain0.3", "mHC", "static", "identity", "permutations", "kronecker", "HC", "HC-fast",
    )  # fmt: skip
    rates: tuple[float, ...] = (0.002,)
    seeds: int = 8
    steps: int = 400
    layers: int = 24
    width: int = 64
    heads: int = 2
    batch: int = 4
    length: int = 64
    embedding: float = 0.16
    weights: float = 1.0
    clip: float = 1.0
    warm_up: int = 40
    measured: int = 10
    held_out: int = 64
    rounds: int = 40
    inner: str = "inductor"

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in VARIANTS:
                raise ExperimentError(f"variant {name!r} is unknown; known: {', '.join(VARIANTS)}")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ExperimentError(f"learning rate {rate} is not a positive number")

    def runs(self) -> Iterator[Run]:
        """Return all runs, variant by variant."""
        for variant in (name for name in VARIANTS if name in self.variants):
            for rate in self.rates:
                for seed in range(self.seeds):
                    yield Run(variant, rate, seed)

    def deciding(self, variant: str | None = None) -> dict[str, Any]:
        """Return what decides the numbers of a run of `variant`, apart from rate and seed."""
        settings = asdict(self)
        for name in ("variants", "rates", "seeds", "rounds"):
            del settings[name]
        return settings if variant is None else settings | VARIANTS[variant].decided()

    def rate_at(self, step: int, peak: float) -> float:
        """Return the learning rate: a linear rise, then a cosine to a tenth of the peak."""
        if step < self.warm_up:
            return peak * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return peak * (0.55 + 0.45 * math.cos(math.pi * done))

    def total_rate(self, peak: float) -> float:
        """Return the sum of the learning rates: about as far as AdamW moves a parameter at most."""
        return sum(self.rate_at(step, peak) for step in range(self.steps))

    def stops(self) -> list[int]:
        """Return the steps after which a run is measured."""
        return sorted({max(1, self.steps * (i + 1) // self.measured) for i in range(self.measured)})

    def finished(self, folder: Path, run: Run) -> dict[str, Any] | None:
        """Return the content of the file of a run, None without one.

        Raises:
            ExperimentError: it was made with other settings, or with defaults of another version.
        """
        path = folder / "runs" / f"{run.name}.json"
        if not path.exists():
            return None
        content = read_json(path)
        self.compare(path, content["settings"], self.deciding(run.variant))
        return content

    def compare_data(self, folder: Path, digest: str) -> None:
        """Raise ExperimentError if a finished run was trained on other sources."""
        for run in self.runs():
            content = self.finished(folder, run)
            if content is not None and content["data"] != digest:
                raise ExperimentError(
                    f"{folder / 'runs' / run.name}.json was trained on the standard library of another Python (digest"
                    f" {content['data'][:12]}, here {digest[:12]}): differences would not be paired. Run that Python, or"
                    " name another folder with --out"
                )

    def compare(self, path: Path, then: dict[str, Any], now: dict[str, Any] | None = None) -> None:
        """Raise ExperimentError if settings of a file differ from `now` (`deciding()`)."""
        now = now or self.deciding()
        wrong = [f"{name} {then.get(name)!r}, not {value!r}" for name, value in now.items() if then.get(name) != value]
        if wrong:
            raise ExperimentError(
                f"{path} was made with {'; '.join(wrong)}. Name another folder with --out, or remove what is there"
            )

    def cost(self, folder: Path) -> dict[str, Any] | None:
        """Return the content of `cost.json`, None without it.

        Raises:
            ExperimentError: it was made with other settings, or without some of the variants.
        """
        path = folder / COST
        if not path.exists():
            return None
        content = read_json(path)
        self.compare(path, content["settings"], self.timed())
        missing = [variant for variant in self.variants if variant not in content["seconds"]]
        if missing:
            raise ExperimentError(f"{path} has no {', '.join(missing)}. Remove it, and it is measured again")
        return content

    def timed(self) -> dict[str, Any]:
        """Return what decides the cost of a step, of all variants."""
        return self.deciding() | {name: VARIANTS[name].decided() for name in self.variants}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        values = json.loads(text)
        return cls(**{**values, "variants": tuple(values["variants"]), "rates": tuple(values["rates"])})


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write all or nothing: a killed process leaves no half file that looks like a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    separators = (",", ":") if indent is None else None
    temporary.write_text(json.dumps(content, indent=indent, separators=separators) + "\n")
    temporary.replace(path)


#: Plans by name. Each has a folder of results; that of "main" is `results` itself.
TABLES: dict[str, Plan] = {
    "main": Plan(),
    "starved": Plan(variants=("plain", "scalars", "paper", "gain0.3", "HC"), weights=0.16),
    "sweep": Plan(variants=("plain",), rates=(0.0005, 0.001, 0.002, 0.004), seeds=2),
    "parts": Plan(
        variants=(
            "plain", "mHC", "scale1", "gain0.04", "paper", "gain0.3", "gain1", "static", "static-paper",
            "lean0.4", "lean0.9", "n2", "learned", "single-pass", "decay",
        ),
        seeds=5,
    ),
    "longer": Plan(variants=("plain", "scalars", "paper", "mHC"), seeds=3, steps=1600),
    "long": Plan(
        variants=("plain", "scalars", "paper", "gain0.3", "mHC", "gain1"), rates=(0.004,), seeds=5, layers=6, steps=3000, warm_up=100
    ),
    "tune": Plan(variants=("plain", "attached", "mHC"), seeds=5, steps=800),
    "full": Plan(
        variants=("plain", "scalars", "mHC", "static", "paper"), rates=(0.003,), seeds=3, layers=8, width=128, heads=4, batch=8, length=256,
        steps=3000, warm_up=100,
    ),
    "wide": Plan(variants=("plain", "mHC", "paper"), rates=(0.001,), seeds=3, layers=6, width=256, heads=8),
    "deep": Plan(variants=("plain", "mHC", "paper"), rates=(0.001,), seeds=3, layers=48, steps=300),
    "unclipped": Plan(variants=("plain", "mHC", "HC", "HC-fast"), rates=(0.004, 0.008), seeds=4, layers=48, steps=300, clip=1e6),
}  # fmt: skip
