"""`torchtitan.train` on a machine without an accelerator.

torchtitan 0.3 asks its device for a name and for memory, divides gradients by an operation that
gloo lacks, and sets timeouts by a function that torch 2.13 lacks. Nothing else is changed.
"""

import types

import torch
import torch._utils
from torch.distributed.fsdp import FSDPModule

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda device=None: "CPU"
torch.cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=1 << 30)
torch.cpu.current_device = lambda: 0
torch.cpu.memory_stats = lambda device=None: {}
torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda: None
torch.distributed.set_timeout = lambda *args, **kwargs: None

set_factor = FSDPModule.set_gradient_divide_factor


def set_factor_for_gloo(self, factor):
    self.set_force_sum_reduction_for_comms(True)
    set_factor(self, factor)


FSDPModule.set_gradient_divide_factor = set_factor_for_gloo

from torchtitan.train import main  # noqa: E402 - it asks for the device

if __name__ == "__main__":
    main()
