"""`mhc_compile.parameter_groups`: the parameters of a model as optimizer groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.errors import AttachError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Their weights may have more than one dimension.
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
    """Return the trained parameters of `model` in groups with and without weight decay.

        optimizer = torch.optim.AdamW(
            mhc_compile.parameter_groups(model, weight_decay=0.1), lr=3e-4
        )

    Parameters of two or more dimensions are decayed, also `phi` of hyper-connections. Vectors,
    scalars and normalisation layers are not, hence neither are `bias` and `scale`: decay would draw
    H_res from the identity to the uniform matrix, and each branch's input from one stream to all.

    Args:
        model: a model with hyper-connections, compiled or not. Frozen parameters are left out;
            shared ones count under their first name.
        weight_decay: of the decayed groups; the others have 0.
        lr: learning rate of all groups; by default the optimizer's.
        mhc_lr: learning rate of hyper-connections, which then get their own groups.
        no_decay: `no_decay(name, parameter)` is True for further undecayed parameters, such as
            embeddings.
        named: groups hold (name, parameter) pairs, so that the optimizer's state dict has names.

    Returns:
        Up to two groups, decayed first; with `mhc_lr` up to four, hyper-connections last. Empty
        groups are left out. Parameters keep the model's order.

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
            f"parameter_groups: {type(target).__name__} has no hyper-connections yet, so groups made now would lack"
            " their parameters. Call mhc_compile.attach(model, *example_inputs) first, or the compiled model once"
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
