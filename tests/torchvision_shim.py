"""Make `import torchvision` work beside a CPU-only torch.

PyPI's torchvision is a CUDA build: next to torch's CPU build its compiled operators do not load, and the import stops
at "operator torchvision::nms does not exist". Its pure-Python parts (transforms, model definitions) need no compiled
operator, only the schemas. Importing this module declares them where, and only where, they are absent.
"""

import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[torch.library.Library] = []  # a Library that is garbage-collected takes its schemas away


def _compiled_ops_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing to repair
    from pathlib import Path

    for folder in spec.submodule_search_locations:
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
    return hasattr(torch.ops.torchvision, "nms")


def install() -> None:
    """Declare the missing operator schemas once; does nothing where torchvision's own operators load."""
    if _libraries or _compiled_ops_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS.values():
        library.define(schema)
    _libraries.append(library)


install()
