"""Adapters for training frameworks."""

from mhc_compile.integrations.accelerate import register_with_accelerate
from mhc_compile.integrations.callbacks import StabilityCallback

__all__ = ["StabilityCallback", "register_with_accelerate"]
