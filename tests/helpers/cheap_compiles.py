"""Small models compile faster without two things that tests do not need."""

from __future__ import annotations

import gc

import torch


def make_compiles_cheap() -> None:
    """Take the libraries' objects out of garbage collection, and skip a measurement of Dynamo's.

    Collections would look at half a million objects again and again. For a line in its log, Dynamo
    measures how long guards take with the caches of the processor flushed: 20 ms for every compile.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
