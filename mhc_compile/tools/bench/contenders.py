"""Who is measured: how each contender builds its model and its site, which compiler it gets, and why it cannot run where it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from mhc_compile.tools.bench import ours, peers
from mhc_compile.tools.bench.model import PlainModel, StreamsModel
from mhc_compile.tools.bench.names import LIMIT, NAMES, ONLY_WHEN_NAMED, PLAIN, check_names
from mhc_compile.tools.bench.residual import Cell, Ends, PlainCell, Residual, example

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from mhc_compile.tools.bench.shape import Shape

__all__ = ["CONTENDERS", "Compiler", "Contender", "choose"]

#: "mhc" is our backend, perhaps with another option `recompute`; "operators" is Inductor with our decompositions, for a site; "blocks" compiles
#: what is between the sites, block by block, and leaves the sites to the kernels of the contender.
Compiler = Literal["inductor", "mhc", "mhc-block", "mhc-none", "operators", "eager", "blocks"]
Sites = tuple[list[Residual], Ends]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row.

    Attributes:
        name: what `--only` takes.
        title: what it is, in a few words.
        compiler: for the model of the training step.
        site_compiler: for its single site.
        sites: builds so many residual connections and the ends of the streams; None for the plain model, which ours compiles too.
        package: the module that must be importable, "" for none.
        distribution: what installs it, as pip takes it.
        cuda: whether it needs a CUDA device.
        real: the only dtype that it takes, "" for any.
        kinds: the benchmarks that it takes part in.
        mapping: of H_res, where the contender is ours.
    """

    name: str
    title: str
    compiler: Compiler = "inductor"
    site_compiler: Compiler = "inductor"
    sites: Callable[[Shape, int], Sites] | None = None
    package: str = ""
    distribution: str = ""
    cuda: bool = False
    real: str = ""
    kinds: tuple[str, ...] = ("site", "step")
    mapping: str = "sinkhorn"

    def missing(self, shape: Shape) -> str | None:
        """Why it cannot run here, or None."""
        if self.cuda and shape.device != "cuda":
            return f"its kernels need a CUDA device; this run is on {shape.device}"
        if self.real and shape.dtype != self.real:
            return f"its kernels take {self.real} streams; this run has {shape.dtype}"
        if self.package and not _importable(self.package):
            return f"not installed: pip install {self.distribution}"
        return None

    def installed(self) -> str | None:
        """The version of the package behind it, or None."""
        try:
            return version(self.distribution.partition("[")[0]) if self.distribution else None
        except PackageNotFoundError:
            return None

    def model(self, shape: Shape) -> nn.Module:
        """The model of the training step: `(tokens, targets)` to the loss."""
        if self.sites is None:
            return PlainModel(shape)
        return StreamsModel(shape, self.sites)

    def site(self, shape: Shape) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """One site as a module, and its inputs: `(branch, *held)` to `(h, *held')`."""
        if self.sites is None:
            raise NotImplementedError
        (site,), ends = self.sites(shape, 1)
        return Cell(site), example(shape, site, ends)


class _Plain(Contender):
    def site(self, shape: Shape) -> tuple[nn.Module, tuple[Tensor, ...]]:
        branch, streams, *_ = example(shape, ours.OperatorsSite(shape), Ends(shape.streams))
        return PlainCell(), (branch, streams[..., 0, :].detach().clone().requires_grad_())


class _Ours(Contender):
    """The model is the plain one; the backend does the rest. The site is one operator where there is one, else three."""

    def site(self, shape: Shape) -> tuple[nn.Module, tuple[Tensor, ...]]:
        site = ours.OperatorsSite(shape, self.mapping)
        cell = ours.StepCell(shape, self.mapping) if ours.step_available(shape) else Cell(site)
        return cell, example(shape, site, Ends(shape.streams))


class _Decomposed(Contender):
    """Operators that stay apart and are left to Inductor. The model is the plain one, as of `_Ours`."""

    def model(self, shape: Shape) -> nn.Module:
        return PlainModel(shape)

    def missing(self, shape: Shape) -> str | None:
        if not ours.step_available(shape):
            return f"there is no mhc::step on {shape.device}: 'ours' is the decomposed form already"
        return None


def _operators(shape: Shape, count: int) -> Sites:
    return [ours.OperatorsSite(shape) for _ in range(count)], Ends(shape.streams)


def _deepseek(shape: Shape, count: int) -> Sites:
    return [peers.DeepseekSite(shape) for _ in range(count)], peers.DeepseekEnds(shape)


def _package(shape: Shape, count: int) -> Sites:
    return [peers.PackageSite(shape, index) for index in range(count)], peers.PackageEnds(shape)


def _liger(shape: Shape, count: int) -> Sites:
    return [peers.LigerSite(shape) for _ in range(count)], Ends(shape.streams)


def _tile(shape: Shape, count: int) -> Sites:
    return [peers.TileSite(shape) for _ in range(count)], Ends(shape.streams)


_V4 = "transformers.models.deepseek_v4.modeling_deepseek_v4"
CONTENDERS: tuple[Contender, ...] = (
    _Plain(name=PLAIN, title="plain residual, Inductor"),
    _Ours(name="ours", title='torch.compile(backend="mhc")', compiler="mhc", site_compiler="operators"),
    _Ours(name="ours-block", title='ours, recompute="block"', compiler="mhc-block", kinds=("step",)),
    _Decomposed(
        name="ours-none",
        title='ours, recompute="none"',
        compiler="mhc-none",
        site_compiler="operators",
        sites=_operators,
    ),
    *(
        _Ours(
            name=name,
            title=f'ours, mapping="{name.removeprefix("ours-")}"',
            compiler="mhc",
            site_compiler="operators",
            mapping=name.removeprefix("ours-"),
        )
        for name in ONLY_WHEN_NAMED
    ),
    Contender(
        name="deepseek-v4",
        title="transformers' DeepSeek-V4, Inductor",
        sites=_deepseek,
        package=_V4,
        distribution="transformers",
    ),
    Contender(
        name="deepseek-v4-eager",
        title="transformers' DeepSeek-V4, eager",
        compiler="eager",
        site_compiler="eager",
        sites=_deepseek,
        package=_V4,
        distribution="transformers",
    ),
    Contender(
        name="hyper-connections",
        title="hyper-connections' mHC, Inductor",
        sites=_package,
        package="hyper_connections",
        distribution="hyper-connections",
    ),
    Contender(
        name="liger",
        title="Liger-Kernel's mHC, Inductor",
        sites=_liger,
        package="liger_kernel",
        distribution="liger-kernel",
        cuda=True,
    ),
    Contender(
        name="liger-eager",
        title="Liger-Kernel's mHC, blocks under Inductor",
        compiler="blocks",
        site_compiler="eager",
        sites=_liger,
        package="liger_kernel",
        distribution="liger-kernel",
        cuda=True,
    ),
    Contender(
        name="tilekernels",
        title="TileKernels' mHC, blocks under Inductor",
        compiler="blocks",
        site_compiler="eager",
        sites=_tile,
        package="tile_kernels",
        distribution="tile-kernels",
        cuda=True,
        real="bfloat16",
    ),
)


def choose(names: Sequence[str]) -> tuple[tuple[Contender, ...], bool]:
    """The contenders named, in the table's order, and whether the limit is among them. No names mean all but `ONLY_WHEN_NAMED`.

    The plain model is always there: everything is a ratio over it.

    Raises:
        UnknownNameError: with the nearest names.
    """
    check_names(names)
    chosen = {PLAIN, *(names or set(NAMES) - set(ONLY_WHEN_NAMED))}
    return tuple(contender for contender in CONTENDERS if contender.name in chosen), LIMIT in chosen


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of a parent package
        return False
