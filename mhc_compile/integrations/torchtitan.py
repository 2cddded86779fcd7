"""Hyper-connections in torchtitan, which knows the class of every module and every tensor's name.

Its models check that all of their modules are of torchtitan's own class, and its conversion to
Hugging Face's names leaves out what it does not know.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import warn
from mhc_compile.integrations.entries import REGISTERED, others, own

if TYPE_CHECKING:
    from collections.abc import Collection


def register_with_torchtitan() -> None:
    """Let models and checkpoints of torchtitan contain hyper-connections.

    They are sharded by FSDP2, trained and saved as all parameters are. In a checkpoint with the
    names of Hugging Face (`last_save_in_hf`, `initial_load_in_hf`) they keep their own names; one
    that has none leaves them at their start.

    This replaces `BaseModel.verify_module_protocol` and `CheckpointManager.dcp_save` and `dcp_load`
    for good. Where both packages are imported, in any order, it has been called. Calling it again
    changes nothing.

    Raises:
        ImportError: torchtitan is not installed.
    """
    model = importlib.import_module("torchtitan.protocols.model").BaseModel
    manager = importlib.import_module("torchtitan.components.checkpointer.dcp").CheckpointManager
    verify, save, load = model.verify_module_protocol, manager.dcp_save, manager.dcp_load
    if hasattr(verify, REGISTERED):
        return

    @functools.wraps(verify)
    def verify_module_protocol(self: Any) -> None:
        from mhc_compile.attachment.model_tree import HyperConnections

        every = self.named_modules
        containers = [module for module in self.modules() if isinstance(module, HyperConnections)]
        ours = {part for container in containers for part in container.modules()}
        self.named_modules = lambda: (entry for entry in every() if entry[1] not in ours)
        try:
            verify(self)
        finally:
            del self.named_modules

    @functools.wraps(save)
    def dcp_save(self: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        plain = self.sd_adapter
        self.sd_adapter = plain and _Converter(plain, own(state_dict))
        try:
            return save(self, state_dict, *args, **kwargs)
        finally:
            self.sd_adapter = plain

    @functools.wraps(load)
    def dcp_load(
        self: Any, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, *args: Any, **kwargs: Any
    ) -> Any:
        plain = self.sd_adapter
        if from_hf and plain is not None:
            saved = own(plain.get_hf_storage_reader(checkpoint_id).read_metadata().state_dict_metadata)
            if lost := sorted(saved.keys() - state_dict.keys()):
                warn(
                    f"{checkpoint_id} has hyper-connections ({lost[0]}, ...) that this model has not: they are left out. Run"
                    " it with the plan with which they were trained"
                )
            self.sd_adapter = _Converter(plain, saved.keys() & state_dict.keys())
        try:
            return load(self, state_dict, checkpoint_id, from_hf, *args, **kwargs)
        finally:
            self.sd_adapter = plain

    setattr(verify_module_protocol, REGISTERED, True)
    model.verify_module_protocol, manager.dcp_save, manager.dcp_load = verify_module_protocol, dcp_save, dcp_load


class _Converter:
    """A converter of torchtitan that passes on the entries called `names` as they are."""

    def __init__(self, plain: Any, names: Collection[str]) -> None:
        self._plain, self._names = plain, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    @property
    def fqn_to_index_mapping(self) -> dict[str, int] | None:
        """The number of the file of each name; theirs is the first."""
        files = self._plain.fqn_to_index_mapping
        return files and {**dict.fromkeys(self._names, min(files.values())), **files}

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert to Hugging Face's names."""
        return {**self._plain.to_hf(others(state)), **self._chosen(state)}

    def from_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert from Hugging Face's names."""
        return {**self._plain.from_hf(others(state)), **self._chosen(state)}

    def _chosen(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in state.items() if name in self._names}
