"""Distributed training: sharding with FSDP2, and checks for wrappers that would miss hyper-connections."""

from mhc_compile.distributed.fsdp import fully_shard

__all__ = ["fully_shard"]
