"""What the sites keep between forward and backward, counted by hand.

With n streams of width C and K coefficients a token, a site that is not computed again keeps its streams (n C), its branch's output (C) and its
coefficients (K, float32). What the branch reads takes the place of what it reads in the plain model. With recompute="block" only the first of every
`sqrt(n L / (n + 2))` sites keeps streams, coefficients and what its branch reads (arXiv 2512.24880 v2, section 4.3); every site keeps its branch's
output.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from mhc_compile.mappings import get_mapping
from mhc_compile.passes.transforms.recompute import block_length

if TYPE_CHECKING:
    from mhc_compile.config.options import Recompute, ResolvedOptions

__all__ = ["kept_bytes"]

#: Bytes of a coefficient.
_FLOAT32 = 4


def kept_bytes(width: int, itemsize: int, options: ResolvedOptions, sites: int, recompute: Recompute) -> int:
    """Bytes per token that all sites of a chain keep beyond what the plain model keeps.

    Args:
        width: C.
        itemsize: bytes of an element of the streams.
        options: number of streams and mapping.
        sites: residual adds of the chain.
        recompute: "cheap" or "block".
    """
    n = options.streams
    first = sites if recompute == "cheap" else ceil(sites / block_length(sites, n))
    coefficients = _FLOAT32 * (2 * n + get_mapping(options.mapping).logits(n))
    # A branch whose input is computed again does not keep it, as the plain model does.
    features = first * n + sites - (sites - first)
    return features * width * itemsize + first * coefficients
