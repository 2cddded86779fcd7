"""All private torch names that this package uses; `README.md` lists each with its purpose.

Checked on torch 2.13.0 (CPU). A name that a version of torch lacks fails here, with the version in
the message, and nowhere else. `__all__` of each module says what it exports.
"""

# ruff: noqa: F403 - each module's `__all__` is the list of names

from __future__ import annotations

import torch

try:
    from mhc_compile._torch.distributed import *
    from mhc_compile._torch.dynamo import *
    from mhc_compile._torch.flops import *
    from mhc_compile._torch.fx import *
    from mhc_compile._torch.inductor import *
    from mhc_compile._torch.logging import *
    from mhc_compile._torch.modules import *
    from mhc_compile._torch.optim import *
except ImportError as error:  # pragma: no cover - depends on the torch that is installed
    raise ImportError(
        f"mhc_compile works with torch 2.11 to 2.13; torch {torch.__version__} lacks what it needs: {error}"
    ) from error
