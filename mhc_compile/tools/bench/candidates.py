"""The candidates: names, models, sites and compilers. Torch is not imported before one is built."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from mhc_compile.tools.bench.sites import Residual, Shape, StreamEnds

PLAIN, LIMIT = "plain", "limit"
#: "mhc" is the backend of this package, with a suffix for another option `recompute`. "operators"
#: is Inductor with its decompositions, for a site. "blocks" compiles the branches one by one and
#: leaves the sites to the candidate's kernels.
Compiler = Literal["inductor", "mhc", "mhc-block", "mhc-none", "operators", "eager", "blocks"]


class UnknownNameError(MhcError):
    """No row of the benchmark has this name."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row."""

    name: str  # value of `--only`
    title: str  # a short description
    compiler: Compiler = "inductor"  # of the model of the training step
    site_compiler: Compiler = "inductor"  # of the single site
    connection: str = "operators"  # key of `sites.CONNECTIONS`; the candidate's residual connection
    plain_model: bool = False  # whether the step runs the plain model, as it is or rewritten by the backend
    package: str = ""  # the module that must be importable, "" for none
    distribution: str = ""  # its name for pip
    cuda: bool = False  # whether it needs a CUDA device
    dtype: str = ""  # the only dtype of streams that it supports, "" for any
    kinds: tuple[str, ...] = ("site", "step", "forward")  # the benchmarks that it takes part in
    options: Mapping[str, Any] = field(default_factory=dict)  # of the backend, for candidates of this package

    def missing(self, shape: Shape) -> str | None:
        """Return why it cannot run here, or None."""
        if self.cuda and shape.device != "cuda":
            return f"its kernels need a CUDA device; this run is on {shape.device}"
        if self.dtype and shape.dtype != self.dtype:
            return f"its kernels take {self.dtype} streams; this run has {shape.dtype}"
        if self.package and not _importable(self.package):
            return f"not installed: pip install {self.distribution}"
        if self.compiler == "mhc-none":
            from mhc_compile.tools.bench.sites import step_available

            if not step_available(shape):
                return f"there is no mhc::step on {shape.device}: 'ours' is the decomposed form already"
        return None

    def installed(self) -> str | None:
        """Return the version of its package, or None."""
        try:
            return version(self.distribution.partition("[")[0]) if self.distribution else None
        except PackageNotFoundError:
            return None

    def sites(self, shape: Shape, count: int) -> tuple[list[Residual], StreamEnds]:
        """Return `count` residual connections and the ends of their streams."""
        from mhc_compile.tools.bench.sites import CONNECTIONS

        site, ends = CONNECTIONS[self.connection]
        return [site(shape, index) for index in range(count)], ends(shape)

    def model(self, shape: Shape) -> nn.Module:
        """Return the model of the step: `(tokens, targets)`, int64 [1, T] each, to the loss."""
        from mhc_compile.tools.bench.workloads import PlainModel, StreamsModel

        return PlainModel(shape) if self.plain_model else StreamsModel(shape, self.sites)

    def site(self, shape: Shape) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Return one site as a module, `(branch, *held)` to `(h, *held')`, and its inputs."""
        from mhc_compile.tools.bench.sites import cell, own_cell, plain_cell

        if self.name == PLAIN:
            return plain_cell(shape)
        if self.plain_model:
            return own_cell(shape, self.options, fused=self.compiler != "mhc-none")
        (site,), ends = self.sites(shape, 1)
        return cell(shape, site, ends)


_EAGER: dict[str, Any] = {"compiler": "eager", "site_compiler": "eager"}
_BLOCKS: dict[str, Any] = {"compiler": "blocks", "site_compiler": "eager"}
_OURS = Candidate(
    name="ours", title='torch.compile(backend="mhc")', compiler="mhc", site_compiler="operators",
    plain_model=True,
)  # fmt: skip
_DEEPSEEK = Candidate(
    name="deepseek-v4", title="transformers' DeepSeek-V4, Inductor", connection="deepseek",
    package="transformers.models.deepseek_v4.modeling_deepseek_v4", distribution="transformers",
)  # fmt: skip
_PACKAGE = Candidate(
    name="hyper-connections", title="hyper-connections' mHC, Inductor", connection="package",
    package="hyper_connections", distribution="hyper-connections",
)  # fmt: skip
_LIGER = Candidate(
    name="liger", title="Liger-Kernel's mHC, Inductor", connection="liger",
    package="liger_kernel", distribution="liger-kernel", cuda=True,
)  # fmt: skip
_TILE = Candidate(
    name="tilekernels", title="TileKernels' mHC, blocks under Inductor", connection="tile",
    package="tile_kernels", distribution="tile-kernels", cuda=True, dtype="bfloat16", **_BLOCKS,
)  # fmt: skip
#: `ours` with other conventions; on CPU a table of all candidates has the paper's alone.
_CONVENTIONS = (
    *(
        replace(_OURS, name=f"ours-{value}", title=f'ours, {name}="{value}"', options={name: value})
        for name, values in (
            ("preset", ("deepseek-v4", "deepseek-v4.1")),
            ("mapping", ("identity", "permutations", "kronecker", "unconstrained")),
        )
        for value in values
    ),
    replace(_OURS, name="ours-single-pass", title="ours, single_pass=True", options={"single_pass": True}),
)
CANDIDATES: tuple[Candidate, ...] = (
    Candidate(name=PLAIN, title="plain residual, Inductor", plain_model=True),
    _OURS,
    replace(_OURS, name="ours-block", title='ours, recompute="block"', compiler="mhc-block", kinds=("step",)),
    replace(_OURS, name="ours-none", title='ours, recompute="none"', compiler="mhc-none", kinds=("site", "step")),
    *_CONVENTIONS,
    _DEEPSEEK,
    replace(_DEEPSEEK, name="deepseek-v4-eager", title="transformers' DeepSeek-V4, eager", **_EAGER),
    _PACKAGE,
    _LIGER,
    replace(_LIGER, name="liger-eager", title="Liger-Kernel's mHC, blocks under Inductor", **_BLOCKS),
    _TILE,
)
NAMES = (*(candidate.name for candidate in CANDIDATES), LIMIT)
#: Rows of a table for which no names are given, by device. On CUDA they fit into ten minutes.
DEFAULT = {
    "cpu": tuple(name for name in NAMES if name not in {candidate.name for candidate in _CONVENTIONS}),
    "cuda": (PLAIN, "ours", "ours-deepseek-v4", "ours-deepseek-v4.1", "deepseek-v4", "liger", LIMIT),
}


def choose(names: Sequence[str], device: str = "cpu") -> tuple[tuple[Candidate, ...], bool]:
    """Return the named candidates in the table's order, and whether the limit is one of the names.

    The plain model is always included: all ratios are over it. No names mean those of `DEFAULT`.

    Raises:
        UnknownNameError: with the nearest names.
    """
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
            guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise UnknownNameError(f"--only {name!r}: there is no such candidate; {guess}known: {', '.join(NAMES)}")
    chosen = {PLAIN, *(names or DEFAULT[device])}
    return tuple(candidate for candidate in CANDIDATES if candidate.name in chosen), LIMIT in chosen


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of a parent package
        return False
