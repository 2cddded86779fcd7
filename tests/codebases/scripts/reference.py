"""Evaluate a checkpoint twice: as the plain model, and on streams without `mhc run`."""

import json

import torch

import mhc_compile


def stripped(state):
    """Return a state dict without the prefix that torch.compile and DDP put before names."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}


def both(make, state, evaluate):
    """Print `[evaluate(plain model), evaluate(model on streams)]` as JSON."""
    state = stripped(state)
    plain = make().eval()
    plain.load_state_dict({name: value for name, value in state.items() if ".mhc." not in f".{name}"})
    model = make().eval()
    mhc_compile.restore(model, state)
    model.load_state_dict(state)
    with torch.no_grad():
        print(json.dumps([evaluate(plain), evaluate(mhc_compile.eager(model))]))
