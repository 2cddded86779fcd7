"""The public functions: convert state dicts, and import and export those of models."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import CONTAINER, connections, plain_name, unwrap
from mhc_compile.checkpoints.load import load_state_dict
from mhc_compile.config.presets import get_preset
from mhc_compile.errors import AttachError, CheckpointError
from mhc_compile.interop.layouts import get_layout
from mhc_compile.interop.planner import plan_from_native, plan_to_native
from mhc_compile.modules.state_dict import saved_speeds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from mhc_compile.interop.plan import Plan


def to_native(
    state: Mapping[str, Tensor],
    preset: str,
    *,
    spelling: str = "transformers",
    branches: Mapping[str, str] | None = None,
) -> OrderedDict[str, Tensor]:
    """Convert a state dict in our layout to that of the system that `preset` stands for.

    Parameters of hyper-connections get the system's names and shapes (new tensors, the same values
    and dtypes; bias and scale times the speeds that the metadata say). Every other entry is the
    same tensor under the same name. `from_native` of the result is `state` again, bit for bit.

    Args:
        state: the `state_dict()` of a model with hyper-connections.
        preset: "deepseek-v4", "glm5-next", "hy-v4", "qwen4-exp", or one with a registered layout.
        spelling: the names to use: "transformers", those of the module in transformers; "saved",
            those of its `save_pretrained`; "published", those of the original release.
        branches: our names of branches, where they differ from the system's: {"attn": "self_attn"}.

    Raises:
        OptionError: no such preset, layout or spelling.
        CheckpointError: the hyper-connections are not of the system's kind (the message names the
            preset that fits), or have no counterpart in it.
    """
    plan = plan_to_native(_shapes(state), preset, spelling=spelling, branches=branches)
    mapping = get_preset(preset).convention.mapping
    for path, entry in (_torch.state_metadata(state) or {}).items():
        if CONTAINER in path.split("."):
            for name, wanted in (("preset", preset), ("mapping", mapping)):
                if entry.get(name, wanted) != wanted:
                    raise CheckpointError(
                        f"preset {preset!r}: {path} was saved by a model with {name}={entry[name]!r}, not {wanted!r};"
                        " the same numbers stand for another function there"
                    )
    return plan.apply(_at_speed_1(state))


def _at_speed_1(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return `state` with bias and scale for speeds of 1, by those in its metadata."""
    metadata = _torch.state_metadata(state) or {}
    found = {path: saved_speeds(entry, {}) for path, entry in metadata.items()}
    factors = {f"{path}.{name}": speed for path, speeds in found.items() for name, speed in speeds.items()}
    if set(factors.values()) <= {1.0}:
        return state
    result = OrderedDict((n, value * factors[n] if n in factors else value) for n, value in state.items())
    _torch.set_state_metadata(result, metadata)
    return result


def _marked(state: OrderedDict[str, Tensor], plan: Plan) -> OrderedDict[str, Tensor]:
    """Say in the metadata of a converted state dict that its speeds are 1, for any model."""
    metadata = dict(_torch.state_metadata(state) or {})
    for path in {target.rpartition(".")[0] for target in plan.changes}:
        metadata[path] = {**metadata.get(path, {}), "gate_speed": 1.0, "scale_speed": 1.0}
    _torch.set_state_metadata(state, metadata)
    return state


def from_native(
    state: Mapping[str, Tensor], preset: str, *, branches: Mapping[str, str] | None = None
) -> OrderedDict[str, Tensor]:
    """Convert a native state dict, of any spelling of the system, to our layout.

    Files of another system, a transposed projection and missing parameters are detected by names
    and shapes. Transposed residual logits and exchanged pre and post are not: any numbers are
    valid logits.

    Args:
        state: the `state_dict()` of the system's model, or the contents of its files.
        preset: the system.
        branches: our names of branches, where they differ from the system's: {"attn": "self_attn"}.

    Raises:
        OptionError: no such preset or layout.
        CheckpointError: names or shapes are not those of the system (the message names the preset
            that fits), or entries are missing.
    """
    plan = plan_from_native(_shapes(state), preset, branches=branches)
    return _marked(plan.apply(state), plan)


def export_state_dict(
    model: nn.Module, preset: str, *, spelling: str = "transformers", branches: Mapping[str, str] | None = None
) -> OrderedDict[str, Tensor]:
    """Return a model's state dict for the shipping model of the system that `preset` stands for.

    The state dict holds parameters alone. The shipping model's config must have the streams,
    iterations and epsilons of the options; those of the preset are the config's defaults.

    Args:
        model: a model with hyper-connections (compiled and called, or attached with
            `options={"preset": preset}`), or the result of `torch.compile` for it.
        preset: the system.
        spelling: as for `to_native`.
        branches: as for `to_native`.

    Raises:
        AttachError: the model has no hyper-connections.
        OptionError: no such preset, layout or spelling.
        CheckpointError: as for `to_native`.
    """
    target = _attached(model, preset)
    return to_native(target.state_dict(), preset, spelling=spelling, branches=branches)


def import_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    preset: str,
    *,
    branches: Mapping[str, str] | None = None,
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Load the state dict of a system's shipping model into a plain model with hyper-connections.

    Args:
        model: a model with hyper-connections (compiled and called, or attached with
            `options={"preset": preset}`), or the result of `torch.compile` for it.
        state: the `state_dict()` of the shipping model. It is not modified.
        preset: the system.
        branches: as for `from_native`.
        strict: as for `nn.Module.load_state_dict`; False loads the entries that both have.
        assign: as for `nn.Module.load_state_dict`.

    Returns:
        Missing and unexpected keys, as `nn.Module.load_state_dict` does.

    Raises:
        AttachError: the model has no hyper-connections, or others than the state dict.
        OptionError: no such preset or layout.
        CheckpointError: as for `from_native`.
        RuntimeError: torch's, where other entries are missing, unexpected or of the wrong shape.
    """
    target = _attached(model, preset)
    expected = [plain_name(name) for name in target.state_dict()]
    plan = plan_from_native(_shapes(state), preset, branches=branches, expected=expected)
    return load_state_dict(target, _marked(plan.apply(state), plan), strict=strict, assign=assign)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}


def _attached(model: nn.Module, preset: str) -> nn.Module:
    get_layout(preset)
    target = unwrap(model)
    if not connections(target):
        raise AttachError(
            f"{type(target).__name__} has no hyper-connections. Attach them first:"
            f" mhc_compile.attach(model, *example_inputs, options={{'preset': {preset!r}}})"
        )
    wanted = {"preset": preset, "mapping": get_preset(preset).convention.mapping}
    for path, connection in connections(target).items():
        for name, value in wanted.items():
            if getattr(connection, name) != value:
                raise AttachError(
                    f"{path} was attached with {name}={getattr(connection, name)!r}, and the same numbers stand for another"
                    f" function with {name}={value!r}. Attach the model with options={{'preset': {preset!r}}}"
                    " (mhc_compile.detach(model) first)"
                )
    return target
