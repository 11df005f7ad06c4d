"""The one place that imports torchvision.

The default torchvision wheel is built against a CUDA build of torch. Beside a CPU build its C++
operators cannot be loaded, and then `import torchvision` fails although all we want from it (data
set readers, the reference ResNet-18) is plain Python: it attaches fake kernels to two operators,
`torchvision::nms` and `torchvision::qnms`, whose schemas only the C++ library defines. Defining the
two schemas is enough to make the import pass; calling the operators still fails, with torchvision's
own explanation.
"""

from __future__ import annotations

import importlib
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

_lock = threading.Lock()
_libraries: list[torch.library.Library] = []  # definitions live as long as their library object


def torchvision_module() -> ModuleType:
    """Import torchvision and return it, whether or not its C++ operators can be loaded.

    May be called any number of times and from any thread. Raises ImportError when torchvision is
    not installed.
    """
    with _lock:
        spec = find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise ImportError("torchvision is not installed: pip install torchvision")
        if not _extension_loads(Path(spec.origin).parent):
            _define_schemas()
        return importlib.import_module("torchvision")


def _extension_loads(package: Path) -> bool:
    # Loading a library twice is harmless, so this can be tried before torchvision does the same.
    library = next((p for s in EXTENSION_SUFFIXES if (p := package / f"_C{s}").is_file()), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def _define_schemas() -> None:
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(name + _ARGUMENTS)
            _libraries.append(library)
