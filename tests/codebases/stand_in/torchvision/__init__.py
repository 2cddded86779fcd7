"""The installed torchvision, also where its extension cannot be loaded.

The package index has wheels of torchvision that are built for CUDA. With a CPU build of torch their
extension does not load, the operators have no schemas, and `import torchvision` fails. Transforms,
datasets and models are plain Python and need no operator. This package is first on PYTHONPATH: it
declares the operators and becomes the installed package. An operator that is called fails as it
would without the extension.
"""

import contextlib
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

_HERE = Path(__file__).parent.parent.resolve()
_spec = PathFinder.find_spec("torchvision", [entry for entry in sys.path if Path(entry).resolve() != _HERE])
if _spec is None or _spec.origin is None or _spec.loader is None:
    raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
_root = Path(_spec.origin).parent
try:
    for _extension in _root.glob("_C.*"):
        torch.ops.load_library(str(_extension))
except OSError:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _pattern = r'torchvision::(\w+)|register_meta\("(\w+)"|torch\.ops\.torchvision\.(\w+)'
    for _names in {match for file in _root.rglob("*.py") for match in re.findall(_pattern, file.read_text())}:
        with contextlib.suppress(RuntimeError):  # declared already
            _library.define(f"{''.join(_names)}(Tensor input) -> Tensor")
__file__, __path__ = _spec.origin, [str(_root)]
exec(compile(Path(__file__).read_text(), __file__, "exec"))
