"""State dicts in our layout and in native ones, with a model and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile._torch import state_metadata
from mhc_compile.attachment.sites import CONTAINER, connections, unwrap
from mhc_compile.checkpoints.load import load_state_dict, plain_name
from mhc_compile.config.presets import get_preset
from mhc_compile.errors import AttachError, CheckpointError
from mhc_compile.interop.layouts import get_layout
from mhc_compile.interop.reading import plan_from_native
from mhc_compile.interop.writing import plan_to_native

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["export_state_dict", "from_native", "import_state_dict", "to_native"]


def to_native(
    state: Mapping[str, Tensor],
    preset: str,
    *,
    spelling: str = "transformers",
    branches: Mapping[str, str] | None = None,
) -> OrderedDict[str, Tensor]:
    """A state dict in our layout, as the system that `preset` stands for would write it.

    Parameters of hyper-connections get the system's names and shapes (new tensors, the same values, the same dtypes); every other entry is the
    same tensor under the same name. `from_native` of the result gives `state` again, bit for bit.

    Args:
        state: what `state_dict()` of a model with hyper-connections returns.
        preset: "deepseek-v4", "glm5-next", "hy-v4", or another one of `LAYOUTS`.
        spelling: whose names: "transformers", the model's in transformers; "saved", of what its `save_pretrained` writes; "published".
        branches: for models whose branches have other names than the system's: {"attn": "self_attn"}.

    Raises:
        OptionError: no such preset, layout or spelling.
        CheckpointError: the hyper-connections are not of the system's kind (the message says which preset fits), or have no counterpart there.
    """
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    plan = plan_to_native(shapes, preset, spelling=spelling, branches=branches)
    mapping = get_preset(preset).convention.mapping
    for path, entry in (state_metadata(state) or {}).items():
        if CONTAINER in path.split("."):
            for name, wanted in (("preset", preset), ("mapping", mapping)):
                if entry.get(name, wanted) != wanted:
                    raise CheckpointError(
                        f"preset {preset!r}: {path} was saved by a model with {name}={entry[name]!r}, not {wanted!r}; the same numbers stand for"
                        " another function there"
                    )
    return plan.apply(state)


def from_native(
    state: Mapping[str, Tensor], preset: str, *, branches: Mapping[str, str] | None = None
) -> OrderedDict[str, Tensor]:
    """A native state dict, of any spelling of the system, in our layout: the opposite of `to_native`.

    Told by names and shapes: another system's files, a projection that is transposed, missing parameters. Not to be told, because any numbers are
    valid logits: residual logits that were written across the diagonal, pre and post in each other's place.

    Args:
        state: what `state_dict()` of the system's model returns, or what was read of its files.
        preset: the system.
        branches: for models whose branches have other names than the system's: {"attn": "self_attn"}.

    Raises:
        OptionError: no such preset or layout.
        CheckpointError: names or shapes are not those of the system (the message says which preset fits), or entries are missing.
    """
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    return plan_from_native(shapes, preset, branches=branches).apply(state)


def export_state_dict(
    model: nn.Module, preset: str, *, spelling: str = "transformers", branches: Mapping[str, str] | None = None
) -> OrderedDict[str, Tensor]:
    """The state dict of a model with hyper-connections, for the shipping model of the system that `preset` stands for.

    A state dict has no numbers but the parameters: the shipping model's config must say the streams, the iterations and the epsilons that the
    options said here. Those of the preset are the config's defaults.

    Args:
        model: one that was compiled and called, or attached; or what `torch.compile` returned for it.
        preset: the system; the model must have been attached with `options={"preset": preset}`.
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
    """Loads the state dict of a system's shipping model into the plain model with hyper-connections.

    Args:
        model: one that was compiled and called, or attached, with `options={"preset": preset}`; or what `torch.compile` returned for it.
        state: what `state_dict()` of the shipping model returns. It stays as it is.
        preset: the system.
        branches: as for `from_native`.
        strict: as for `nn.Module.load_state_dict`; False loads what both have.
        assign: as for `nn.Module.load_state_dict`.

    Returns:
        What `nn.Module.load_state_dict` returns: missing and unexpected keys.

    Raises:
        AttachError: the model has no hyper-connections, or others than the state dict.
        OptionError: no such preset or layout.
        CheckpointError: as for `from_native`.
        RuntimeError: torch's, where other entries are missing, unexpected or of the wrong shape.
    """
    target = _attached(model, preset)
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    expected = [plain_name(name) for name in target.state_dict()]
    plan = plan_from_native(shapes, preset, branches=branches, expected=expected)
    return load_state_dict(target, plan.apply(state), strict=strict, assign=assign)


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
                    f"{path} was attached with {name}={getattr(connection, name)!r}, and the same numbers stand for another function with"
                    f" {name}={value!r}. Attach the model with options={{'preset': {preset!r}}} (mhc_compile.detach(model) first)"
                )
    return target
