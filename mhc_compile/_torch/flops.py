"""FLOP counter of torch, extended by the attention kernel of the CPU, which it does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the FLOPs of what runs in it."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:  # noqa: ARG001 - the counter's signature
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]
