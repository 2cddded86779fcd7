"""`mhc_compile.parameter_groups`: the parameters of a model, as groups for an optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.errors import AttachError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["parameter_groups"]

#: Those whose weights may have more than one dimension.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    lr: float | None = None,
    mhc_lr: float | None = None,
    no_decay: Callable[[str, nn.Parameter], bool] | None = None,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Every trained parameter of `model`, once, in groups with and without weight decay.

        optimizer = torch.optim.AdamW(mhc_compile.parameter_groups(model, weight_decay=0.1),
        lr=3e-4)

    Decayed is what multiplies features: parameters of two and more dimensions, `phi` of
    hyper-connections among them. Not decayed are parameters of one dimension or none and those of
    normalisation layers, hence `bias` and `scale` of hyper-connections: decay would draw H_res from
    the identity to the uniform matrix, and the read-out of every branch from its stream to all of
    them.

    Args:
        model: a model with hyper-connections, or one that `torch.compile` returned. Frozen
            parameters are left out; shared ones are in the group of the first name that
            `model.named_parameters()` gives them.
        weight_decay: of the decayed groups; the others have 0.
        lr: learning rate of all groups; the optimizer's own without it.
        mhc_lr: learning rate of hyper-connections, which then have groups of their own.
        no_decay: `no_decay(name, parameter)` is true for further parameters that are not to decay,
            e.g. embeddings.
        named: groups hold pairs of name and parameter, so that the optimizer's state dict has the
            names.

    Returns:
        Up to two groups, decayed first; with `mhc_lr` up to four, those of hyper-connections last.
        Empty ones are left out. Within a group parameters are in the order of the model.

    Raises:
        AttachError: the model has no hyper-connections yet.
        OptionError: a number is negative or not finite.
    """
    for option, value in {"weight_decay": weight_decay, "lr": lr, "mhc_lr": mhc_lr}.items():
        if value is not None and not 0.0 <= value < math.inf:
            raise OptionError(f"parameter_groups: {option} is {value!r}; expected a finite number, 0 or more")
    target = unwrap(model)
    hyper = {id(p) for connection in connections(target).values() for p in connection.parameters()}
    if not hyper:
        raise AttachError(
            f"parameter_groups: {type(target).__name__} has no hyper-connections yet, so groups made now would lack their parameters."
            " Call mhc_compile.attach(model, *example_inputs) first, or the compiled model once"
        )
    norms = {id(p) for module in target.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    members: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in target.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.dim() >= 2 and id(parameter) not in norms and not (no_decay and no_decay(name, parameter))
        apart = mhc_lr is not None and id(parameter) in hyper
        members.setdefault((apart, not decayed), []).append((name, parameter) if named else parameter)
    groups = []
    for (apart, undecayed), parameters in sorted(members.items()):
        rate = mhc_lr if apart else lr
        group = {"params": parameters, "weight_decay": 0.0 if undecayed else weight_decay}
        groups.append(group if rate is None else {**group, "lr": rate})
    return groups
