"""FSDP for models with hyper-connections: their parameters stay in float32.

Coefficients are computed in float32. Under a `MixedPrecisionPolicy` FSDP gathers all parameters of
a block in its `param_dtype`, and the coefficients would be computed from rounded parameters.
`fully_shard` here gives the hyper-connections of a block a group of their own, sharded like the
rest, that is gathered and reduced as it is stored. FSDP gathers a group when the module that it
belongs to is called, and hyper-connections are never called: the hooks of their group are on the
block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as _shard

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import HyperConnections

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fully_shard"]


def fully_shard(module: nn.Module, *, mp_policy: MixedPrecisionPolicy | None = None, **settings: Any) -> nn.Module:
    """`torch.distributed.fsdp.fully_shard` for modules with hyper-connections, whose parameters are not cast by `mp_policy`.

    Use it as torch's: for every block, and then for the model. Attach hyper-connections before.

    Args:
        module: a block, or the model; also one that `torch.compile` returned, or that
            `module.compile` compiles.
        mp_policy: the precision of all parameters but those of hyper-connections. These keep the
            dtype in which they are stored, float32 as a rule, for gathering, computing and
            reducing.
        **settings: as for torch's `fully_shard`.

    Returns:
        `module`, which is an `FSDPModule` from now on.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    containers: list[nn.Module] = [
        m for m in module.modules() if isinstance(m, HyperConnections) and not _torch.is_sharded(m)
    ]
    if containers and (policy.param_dtype is not None or policy.reduce_dtype is not None):
        _shard(containers, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)
        before, after = _torch.fsdp_hooks(containers[0])
        # Inside the hooks of the module's own group: the first group that runs in a step is the one
        # that leads.
        module.register_forward_pre_hook(before, with_kwargs=True)
        _shard(module, mp_policy=policy, **settings)
        module.register_forward_hook(after, prepend=True)
    else:
        _shard(module, mp_policy=policy, **settings)
    return module
