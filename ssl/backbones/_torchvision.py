"""Import torchvision, even where it is installed beside a CPU-only torch of another build.

There torchvision's compiled part does not load, and its import (and timm's) fails with "operator
torchvision::nms does not exist". Only then, and never beforehand (a good install would abort), the two missing
operators are declared and the import is repeated. `torchvision.ops.nms` and `torchvision.io.decode_jpeg` stay
unavailable in such an install.
"""

import importlib
import sys

import torch

_declared: list[torch.library.Library] = []  # a Library withdraws its operators when it is collected


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


_import_torchvision()
