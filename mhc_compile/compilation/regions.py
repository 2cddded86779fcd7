"""Models whose parts are compiled one by one, by `compile_regions` or `block.compile()`.

A part without residual adds (a patch embedding, a head) is no reason to warn while another part has
hyper-connections, or has not been compiled yet.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import connections

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.capture.frame import Frame

#: By model, the classes of its parts that were compiled without sites, and whether any contracts.
_seen: weakref.WeakKeyDictionary[nn.Module, dict[type, bool]] = weakref.WeakKeyDictionary()
#: Several threads may compile at the same time.
_lock = threading.Lock()


def lacks_sites(part: nn.Module, frame: Frame, *, contracts: bool) -> bool:
    """Return whether a model has no sites, given that `part` has none and is compiled.

    Embeddings, losses and norms are no models: `contracts` says whether the part has a product with
    weights. Equal parts share one compiled graph, so a part counts as compiled with its class.
    """
    model = frame.caller_of(part)
    if model is None:
        return contracts
    if connections(model):
        return False
    compiled = {_torch.original_module(each) for each in model.modules() if _torch.is_compiled(each)}
    with _lock:
        seen = _seen.setdefault(model, {})
        seen[type(part)] = contracts or seen.get(type(part), False)
        waiting = {type(each) for each in compiled} - seen.keys()
        return not waiting and any(seen.values())
