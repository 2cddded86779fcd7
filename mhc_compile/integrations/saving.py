"""Hyper-connections in what peft, torchtune, transformers and distributed checkpoints hold.

peft keeps the parameters of an adapter alone: hyper-connections would be trained and not saved.
torchtune converts names that it knows.
`from_pretrained` of transformers and distributed loads leave out what a new model does not have.
They are changed once they are imported, before or after this package.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mhc_compile._torch import EXPORT_MODULE
from mhc_compile.errors import MhcWarning, warn
from mhc_compile.integrations.entries import REGISTERED, others, own
from mhc_compile.integrations.torchtitan import register_with_torchtitan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


def register_with_peft() -> None:
    """Let adapters of peft contain the hyper-connections of their model, and bring them back.

    They stay trainable in a `PeftModel`, which freezes all that is no adapter: those that a
    compiled call attaches later are trained as well. `PeftModel.save_pretrained` writes them into
    the adapter's file, and `PeftModel.from_pretrained` and `load_adapter` attach them
    (`mhc_compile.restore`), frozen if the adapter is. They belong to the model, not to an adapter:
    of several adapters with hyper-connections the one loaded last gives the values, with a warning.

    This replaces `peft.get_peft_model_state_dict`, `set_peft_model_state_dict` and the constructor
    of `PeftModel` for good. Where both packages are imported, in any order, it has been called.
    Calling it again changes nothing.

    Raises:
        ImportError: peft is not installed.
    """
    peft = importlib.import_module("peft")
    save, load = peft.get_peft_model_state_dict, peft.set_peft_model_state_dict
    if hasattr(save, REGISTERED):
        return

    @functools.wraps(save)
    def get_peft_model_state_dict(model: Any, state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
        from mhc_compile.attachment.model_tree import plain_name

        chosen = save(model, state_dict, *args, **kwargs)
        entries = model.state_dict() if state_dict is None else state_dict
        return {**chosen, **{plain_name(name): value for name, value in own(entries).items()}}

    @functools.wraps(load)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        from mhc_compile.checkpoints.restore import restore

        entries = own(peft_model_state_dict)
        with warnings.catch_warnings():
            if entries:
                warnings.filterwarnings("ignore", "the state dict has no values", MhcWarning)
            result = load(model, others(peft_model_state_dict), adapter_name, *args, **kwargs)
        if entries:
            before = {name: value.clone() for name, value in own(model.state_dict()).items()}
            frozen = model.peft_config[adapter_name].inference_mode
            for connection in restore(model, entries).values():
                connection.requires_grad_(not frozen)
            after = model.state_dict()
            if len(model.peft_config) > 1 and any(not value.equal(after[name]) for name, value in before.items()):
                warn(
                    f"adapter {adapter_name!r} has other values for the hyper-connections, which all adapters of a model"
                    " share: they replace those of the adapter that was loaded before"
                )
        return result

    construct = peft.PeftModel.__init__

    @functools.wraps(construct)
    def __init__(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        from mhc_compile.attachment.model_tree import connections

        trained = [p for connection in connections(model).values() for p in connection.parameters() if p.requires_grad]
        construct(self, model, peft_config, *args, **kwargs)
        for parameter in trained:
            parameter.requires_grad_(not peft_config.inference_mode)

    peft.PeftModel.__init__ = __init__
    setattr(get_peft_model_state_dict, REGISTERED, True)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft":
            for old, new in ((save, get_peft_model_state_dict), (load, set_peft_model_state_dict)):
                if vars(module).get(new.__name__) is old:
                    setattr(module, new.__name__, new)


def register_with_torchtune() -> None:
    """Let the checkpointers of torchtune convert state dicts with hyper-connections.

    `FullModelHFCheckpointer` translates every name and raises for those that it does not know.
    Names of hyper-connections stay as they are, in its first file as in the model. This replaces
    `get_mapped_key` and `FullModelHFCheckpointer.save_checkpoint` for good, and has been called as
    for peft.

    Raises:
        ImportError: torchtune is not installed.
    """
    kind = importlib.import_module("torchtune.training.checkpointing").FullModelHFCheckpointer
    save = kind.save_checkpoint
    translate = importlib.import_module("torchtune.models.convert_weights").get_mapped_key
    if hasattr(translate, REGISTERED):
        return

    @functools.wraps(translate)
    def get_mapped_key(key: str, mapping_dict: dict[str, str]) -> str:
        from mhc_compile.checkpoints.reader import split_entry

        return key if split_entry(key) else translate(key, mapping_dict)

    @functools.wraps(save)
    def save_checkpoint(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        files = self._weight_map  # of every name in the checkpoint that was loaded
        for name in own(state_dict.get("model", {})):
            files.setdefault(name, next(iter(files.values())))
        return save(self, state_dict, *args, **kwargs)

    kind.save_checkpoint = save_checkpoint
    setattr(get_mapped_key, REGISTERED, True)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torchtune" and vars(module).get("get_mapped_key") is translate:
            module.get_mapped_key = get_mapped_key  # type: ignore[attr-defined]


def register_with_transformers() -> None:
    """Let `from_pretrained` warn where it leaves out the hyper-connections of a checkpoint.

    This replaces `from_pretrained` and `load_adapter` of `PreTrainedModel` for good. Where both
    packages are imported, in any order, it has been called. Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed.
    """
    kind = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    load = vars(kind)["from_pretrained"].__func__
    if hasattr(load, REGISTERED):
        return

    adapt = kind.load_adapter

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop("output_loading_info", False)
        model, info = load(cls, pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if not getattr(model, "_hf_peft_config_loaded", False):  # then the keys are those of `load_adapter`
            _warn_of(info["unexpected_keys"], model, pretrained_model_name_or_path)
        return (model, info) if asked else model

    @functools.wraps(adapt)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        info = adapt(self, peft_model_id, *args, **kwargs)
        _warn_of(getattr(info, "unexpected_keys", ()), self, peft_model_id)
        return info

    setattr(from_pretrained, REGISTERED, True)
    kind.from_pretrained, kind.load_adapter = classmethod(from_pretrained), load_adapter


def _warn_of(unexpected: Iterable[str], model: Any, path: Any) -> None:
    lost = sorted(own(dict.fromkeys(unexpected)))
    if lost:
        shown = repr(os.fspath(path)) if path is not None and os.path.isdir(path) else "directory"
        warn(
            f"{path or 'the state dict'} has hyper-connections ({lost[0]}, ...) and {type(model).__name__} was built"
            f" without them: this model is the plain one. Attach them: mhc_compile.restore(model, {shown})",
            repeat=True,
        )


def _register_with_torch() -> None:
    from mhc_compile._torch.checkpoint import observe_distributed_loads

    observe_distributed_loads(_compare)


def _rewrite_exported_programs() -> None:
    from mhc_compile._torch.export import after_exporting

    after_exporting(_on_streams)


def _on_streams(model: Any, program: Any) -> Any:
    """Return the exported program of a model on streams, if the model has hyper-connections."""
    from mhc_compile.attachment.model_tree import connections

    if not connections(model):
        return program
    from mhc_compile.export.exported_program import rewrite_attached

    return rewrite_attached(model, program)


def _compare(asked: Collection[str], saved: Collection[str]) -> None:
    """Warn if a distributed load of a module asks for all but its hyper-connections."""
    lost = [name for name in own(dict.fromkeys(saved)) if name not in asked]
    if any(name.startswith(lost[0].rpartition("mhc.")[0]) for name in asked if lost):
        warn(
            f"the distributed checkpoint has hyper-connections ({lost[0]}, ...) and the model that is loaded has not: they"
            " are left out. Attach them before: mhc_compile.restore(model, directory)",
            repeat=True,
        )


_REGISTER = {
    "peft": register_with_peft,
    "torchtitan.components.checkpointer.dcp": register_with_torchtitan,
    "torchtune.training.checkpointing": register_with_torchtune,
    "transformers.modeling_utils": register_with_transformers,
    "torch.distributed.checkpoint.default_planner": _register_with_torch,
    EXPORT_MODULE: _rewrite_exported_programs,
}


class AfterImport:
    """A meta path finder that finds what the others find, and registers after the import."""

    def __init__(self) -> None:
        self.waiting = set(_REGISTER)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002 - finders' signature
        """Return the spec of the other finders, with a loader that registers; None for others."""
        if name not in self.waiting:
            return None
        self.waiting.remove(name)  # the others are asked now
        spec = find_spec(name)
        self.waiting.add(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            plain = loader.exec_module

            def exec_module(module: Any) -> None:
                loader.exec_module = plain
                plain(module)
                self.waiting.discard(name)
                _REGISTER[name]()

            loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Register with what is imported already, and wait for the rest. It is called once."""
    finder = AfterImport()
    for name in finder.waiting & sys.modules.keys():
        finder.waiting.remove(name)
        _REGISTER[name]()
    sys.meta_path.insert(0, finder)
