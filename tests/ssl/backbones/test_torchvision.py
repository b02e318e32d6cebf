"""The import guard: torchvision and timm import here whatever build of torch they sit beside."""

import subprocess
import sys

BROKEN = """
import sys, types, importlib.abc, importlib.machinery, torch

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "A torchvision that needs its operators, as the real one beside a torch of another build."
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return None
    def exec_module(self, module):
        sys.modules["torchvision.half"] = module
        try:
            torch.ops.torchvision.nms
        except AttributeError:
            raise RuntimeError("MESSAGE") from None
        module.ready = True

sys.meta_path.insert(0, Finder())
# The guard alone: the package around it would import timm, which wants the whole of torchvision.
import importlib.util
spec = importlib.util.spec_from_file_location("guard", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
import torchvision
assert torchvision.ready and sys.modules["torchvision.half"] is torchvision  # not the first, half-imported one
"""


def guard(message: str) -> subprocess.CompletedProcess[str]:
    from nearfar.ssl.backbones import _torchvision

    code = BROKEN.replace("MESSAGE", message)
    return subprocess.run([sys.executable, "-c", code, _torchvision.__file__], capture_output=True, text=True)


def test_missing_operators_are_declared_and_the_import_repeated() -> None:
    run = guard("operator torchvision::nms does not exist")
    assert run.returncode == 0, run.stderr


def test_any_other_error_passes_through() -> None:
    run = guard("something else")
    assert run.returncode != 0
    assert "RuntimeError: something else" in run.stderr


def test_torchvision_and_timm_import() -> None:
    code = "import nearfar.ssl.backbones, timm, torchvision, torchvision.transforms.v2; import ssl; ssl.SSLContext"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
