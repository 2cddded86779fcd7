"""Registers the lazy operators: steps and closes of streams that are not in memory.

    mhc::lazy_step(streams, branches, post, res, phi, bias, scale, write, ...)
        -> (streams', h', pre', post', res', z', inverse', moments')
    mhc::lazy_close(streams, branches, post, res) -> mean

Semantics and shapes: `mhc_compile.ops.lazy_reference`. `passes.LazyStreams` writes them, and their
backwards, into graphs of forward and backward together. They have no gradient of their own, as
there is no tensor of the old streams that it could belong to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile.errors import ShapeError
from mhc_compile.ops import cpu, reference
from mhc_compile.ops import lazy_reference as lazy
from mhc_compile.ops.fused_library import NORM, NORM_BACKWARD, check_read, on_cuda
from mhc_compile.ops.library import LIBRARY, check_mixing, checked

if TYPE_CHECKING:
    from collections.abc import Callable

_SITE = "Tensor phi, Tensor bias, Tensor scale"
_HOW = "str mapping, int iterations, float eps"
_OLD = "Tensor streams, Tensor[] branches, Tensor[] post, Tensor[] res"
_NEXT = "Tensor h, Tensor next_pre, Tensor next_post, Tensor next_res, Tensor z, Tensor inverse, Tensor moments"
_SCHEMAS = (
    f"lazy_step({_OLD}, {_SITE}, bool write, {_HOW}, {NORM}) -> (Tensor streams_out, {_NEXT})",
    f"lazy_step_backward(Tensor? grad_streams, Tensor? grad_h, Tensor? grad_post, Tensor? grad_res, {_OLD}, {_SITE},"
    f" Tensor next_pre, Tensor next_post, Tensor z, Tensor inverse, {_HOW}, {NORM_BACKWARD})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"lazy_close({_OLD}) -> Tensor",
    f"lazy_close_backward(Tensor grad, {_OLD}) -> (Tensor, Tensor, Tensor, Tensor)",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema)


def _check_sites(name: str, streams: Tensor, *lists: list[Tensor], least: int = 2) -> None:
    if len(lists[0]) < least or len({len(one) for one in lists}) > 1:
        raise ShapeError(
            f"mhc::{name}: branches, post and res need a tensor for each of at least {least} sites; got"
            f" {', '.join(str(len(one)) for one in lists)} (mhc::{name.removeprefix('lazy_')} is for one site)"
        )
    for branch, post, res in zip(*lists, strict=True):
        check_mixing(streams, branch, post, res, name=name)


def _check_step(
    streams: Tensor, branches: list[Tensor], post: list[Tensor], res: list[Tensor],
    phi: Tensor, bias: Tensor, scale: Tensor, write: bool, *settings: Any,  # noqa: ARG001
) -> None:  # fmt: skip
    _check_sites("lazy_step", streams, branches, post, res, least=1)
    check_read(streams, phi, bias, scale, post[-1].shape[-1], *settings, name="lazy_step")


_CHECKS: dict[str, Callable[..., None]] = {
    "lazy_step": _check_step,
    "lazy_step_backward": lambda *args: _check_sites("lazy_step_backward", *args[4:8]),
    "lazy_close": lambda *args: _check_sites("lazy_close", *args),
    "lazy_close_backward": lambda *args: _check_sites("lazy_close_backward", *args[1:]),
}


def _fake(name: str) -> Callable[..., Any]:
    def outputs(*args: Any) -> Any:
        given = lazy.by_name(name, args)
        outs = lazy.empty_outputs(name, given)
        return tuple(outs) if len(outs) > 1 else outs[0]

    return outputs


for _name, _check in _CHECKS.items():
    LIBRARY.impl(_name, checked(_check, reference.dense(getattr(lazy, _name))), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, checked(_check, cpu.OPERATORS[_name]), "CPU")
    if "close" not in _name:
        LIBRARY.impl(_name, checked(_check, on_cuda(_name)), "CUDA")
    torch.library.register_fake(f"mhc::{_name}", checked(_check, _fake(_name)), lib=LIBRARY)
