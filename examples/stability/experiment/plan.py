"""The plan: variants, learning rates, seeds, sizes, and files of results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Files of the runs that were trained again, and of the measurement of cost.
AGAIN, COST = "again.json", "cost.json"
#: Mapping of `options={"mapping": ...}` by variant; None is the unmodified model. The slowest
#: first: two processes then end together.
VARIANTS: dict[str, str | None] = {
    "permutations": "permutations",
    "HC": "unconstrained",
    "mHC": "sinkhorn",
    "kronecker": "kronecker",
    "identity": "identity",
    "plain": None,
}
#: Peaks of the learning rate.
RATES = {"calm": 1e-3, "aggressive": 1e-2}


class ExperimentError(Exception):
    """A problem that the user must solve; the message says how."""


@dataclass(frozen=True)
class Run:
    """One training run: a variant, a learning rate, a seed."""

    variant: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.rate}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of the experiment.

    Attributes:
        variants: names of `VARIANTS`, in the order of the tables.
        rates: names of `RATES`.
        seeds: number of seeds; a seed decides initial weights and batches, the same for all
            variants.
        steps, batch, length: steps of a run, sequences a step, bytes a sequence. layers, width,
        heads: of the decoder; a layer has two residual adds. warm_up: steps over which the learning
        rate rises. measured: validations and measurements of the gain in a run, evenly spread, the
        last one at its end. held_out: batches of the last validation; the others take an eighth of
        them. rounds: of the measurement of cost. inner: the compiler of all variants: "inductor",
        "aot_eager" or "eager".
    """

    variants: tuple[str, ...] = ("plain", "HC", "mHC", "identity", "permutations", "kronecker")
    rates: tuple[str, ...] = ("calm", "aggressive")
    seeds: int = 5
    steps: int = 400
    layers: int = 24
    width: int = 64
    heads: int = 2
    batch: int = 4
    length: int = 64
    warm_up: int = 20
    measured: int = 10
    held_out: int = 64
    rounds: int = 40
    inner: str = "inductor"

    def __post_init__(self) -> None:
        for kind, given, known in (("variant", self.variants, VARIANTS), ("learning rate", self.rates, RATES)):
            for name in given:
                if name not in known:
                    raise ExperimentError(f"{kind} {name!r} is unknown; known: {', '.join(known)}")

    def runs(self) -> Iterator[Run]:
        """Return all runs, variant by variant."""
        for variant in (name for name in VARIANTS if name in self.variants):
            for rate in self.rates:
                for seed in range(self.seeds):
                    yield Run(variant, rate, seed)

    def deciding(self) -> dict[str, Any]:
        """Return what decides the numbers of a run, apart from variant, rate and seed."""
        settings = asdict(self)
        for name in ("variants", "rates", "seeds", "rounds"):
            del settings[name]
        return settings

    def stops(self) -> list[int]:
        """Return the steps after which a run is measured."""
        return sorted({max(1, self.steps * (i + 1) // self.measured) for i in range(self.measured)})

    def finished(self, folder: Path, run: Run) -> dict[str, Any] | None:
        """Return the content of the file of a run, None without one.

        Raises:
            ExperimentError: it was made with other settings.
        """
        path = folder / "runs" / f"{run.name}.json"
        if not path.exists():
            return None
        content = read_json(path)
        self.compare(path, content["settings"])
        return content

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
        self.compare(path, content["settings"])
        missing = [variant for variant in self.variants if variant not in content["seconds"]]
        if missing:
            raise ExperimentError(f"{path} has no {', '.join(missing)}. Remove it, and it is measured again")
        return content

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
