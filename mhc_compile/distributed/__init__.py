"""Distributed training: FSDP2 sharding, and checks for wrappers that miss hyper-connections."""

from mhc_compile.distributed.fsdp import fully_shard

__all__ = ["fully_shard"]
