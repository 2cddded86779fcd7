"""What `mhc run` and `mhc plan` set for their process. Does not import torch."""

from __future__ import annotations

from typing import Any

#: Options of every `torch.compile(..., backend="mhc")` that does not give them itself.
default_options: dict[str, Any] = {}
#: Whether the process ends before it trains (`mhc plan`): DDP and FSDP may miss the parameters.
planning = False
