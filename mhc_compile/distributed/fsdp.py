"""FSDP2 for models with hyper-connections: their parameters keep float32.

Under a `MixedPrecisionPolicy` FSDP gathers all parameters of a block in `param_dtype`, which would
round the coefficients. `fully_shard` here gives a block's hyper-connections their own group, which
is gathered and reduced in its stored dtype. FSDP gathers a group when its module is called.
Hyper-connections are never called, so the hooks of their group are on the block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as _shard

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import HyperConnections

if TYPE_CHECKING:
    from torch import nn


def fully_shard(module: nn.Module, *, mp_policy: MixedPrecisionPolicy | None = None, **settings: Any) -> nn.Module:
    """Shard as `torch.distributed.fsdp.fully_shard`, without casting hyper-connections.

    Call it on every block, then on the model. Attach hyper-connections before.

    Args:
        module: a block or the model, compiled or not.
        mp_policy: the precision of all other parameters. Hyper-connections are gathered, computed
            and reduced in their stored dtype, usually float32.
        **settings: as for torch's `fully_shard`.

    Returns:
        `module`, now an `FSDPModule`.
    """
    policy = mp_policy or MixedPrecisionPolicy()
    containers: list[nn.Module] = [
        m for m in module.modules() if isinstance(m, HyperConnections) and not _torch.is_sharded(m)
    ]
    if containers and (policy.param_dtype is not None or policy.reduce_dtype is not None):
        _shard(containers, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)
        before, after = _torch.fsdp_hooks(containers[0])
        # Inside the hooks of the module's own group: the first group to run in a step is the root.
        module.register_forward_pre_hook(before, with_kwargs=True)
        _shard(module, mp_policy=policy, **settings)
        module.register_forward_hook(after, prepend=True)
    else:
        _shard(module, mp_policy=policy, **settings)
    return module
