"""What is run: variants, learning rates, seeds, sizes. Torch is not imported here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["AGAIN", "RATES", "VARIANTS", "ExperimentError", "Plan", "Run", "read_json", "write_json"]

#: File of the runs that were trained once more.
AGAIN = "again.json"
#: By name, the mapping of `options={"mapping": ...}`; None is the model as it is. The slowest to train first: two processes then end together.
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
    """Something that a person must decide; the message says what."""


@dataclass(frozen=True)
class Run:
    """One training run: a variant, a learning rate, a seed."""

    variant: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.variant}-{self.rate}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided beforehand.

    Attributes:
        variants: names of `VARIANTS`. The order is that of the tables.
        seeds: how many; seed s decides initial weights and batches, the same for all variants.
        steps: of one run.
        layers: transformer blocks; each has two residual adds.
        width: C.
        heads: attention heads.
        batch: sequences a step.
        length: bytes a sequence.
        warm_up: steps over which the learning rate rises.
        measured: how many times a run is validated and its gain measured, evenly spread, the last time at its end.
        held_out: batches of the last validation; the others take an eighth of them.
        rounds: of the measurement of cost.
        inner: the compiler of all variants: "inductor", "aot_eager" or "eager".
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
        """All of them, those of one variant behind each other."""
        for variant in (name for name in VARIANTS if name in self.variants):
            for rate in self.rates:
                for seed in range(self.seeds):
                    yield Run(variant, rate, seed)

    def deciding(self) -> dict[str, Any]:
        """What decides the numbers of a run, apart from its variant, rate and seed."""
        settings = asdict(self)
        for name in ("variants", "rates", "seeds", "rounds"):
            del settings[name]
        return settings

    def stops(self) -> list[int]:
        """After how many steps a run is measured."""
        return sorted({max(1, self.steps * (i + 1) // self.measured) for i in range(self.measured)})

    def finished(self, folder: Path, run: Run) -> dict[str, Any] | None:
        """The file of a run that is done, None if there is none.

        Raises:
            ExperimentError: it was made with other settings.
        """
        path = folder / "runs" / f"{run.name}.json"
        if not path.exists():
            return None
        content = read_json(path)
        self.compare(path, content["settings"])
        return content

    def compare(self, path: Path, then: dict[str, Any]) -> None:
        """Holds the settings of a file against these.

        Raises:
            ExperimentError: they differ.
        """
        now = self.deciding()
        wrong = [f"{name} {then.get(name)!r}, not {value!r}" for name, value in now.items() if then.get(name) != value]
        if wrong:
            raise ExperimentError(
                f"{path} was made with {'; '.join(wrong)}. Name another folder with --out, or remove what is there"
            )

    def to_json(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse."""
        values = json.loads(text)
        return cls(**{**values, "variants": tuple(values["variants"]), "rates": tuple(values["rates"])})


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file that `write_json` wrote."""
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """All of it or nothing: whoever is killed meanwhile leaves no half file that a later run would take for a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    separators = (",", ":") if indent is None else None
    temporary.write_text(json.dumps(content, indent=indent, separators=separators) + "\n")
    temporary.replace(path)
