"""The import guard: torchvision and timm import here whatever build of torch they sit beside."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


ROOT = Path(__file__).resolve().parents[3]
MODULES = {
    ".".join(["nearfar", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): file
    for package in ("ssl", "eval", "launch")
    for file in sorted((ROOT / package).rglob("*.py"))
}
FIRST = """
import importlib, importlib.abc, os, sys, traceback
import torch, numpy, PIL, pydantic, yaml  # what a child would otherwise load again

class Watch(importlib.abc.MetaPathFinder):
    "Ends the process when timm or torchvision is about to be imported: 0 where the guard is at work already."
    def find_spec(self, name, path=None, target=None):
        if name in ("timm", "torchvision"):
            os._exit(0 if "nearfar.ssl.backbones._torchvision" in sys.modules else 3)

sys.meta_path.insert(0, Watch())
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:  # of an extra that is not installed
            os._exit(0 if not str(error.name).startswith("nearfar") else 4)
        except BaseException:
            traceback.print_exc()
            os._exit(4)
        os._exit(0)
    print(module, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def first_imports(*modules: str) -> dict[str, int]:
    """For each module, imported first in a process of its own: 3 if timm or torchvision came before the guard."""
    run = subprocess.run([sys.executable, "-c", FIRST, *modules], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {name: int(code) for name, code in (line.split() for line in run.stdout.splitlines())}


IMPORTING = re.compile(r"^\s*(import|from) (timm|torchvision)\b", re.MULTILINE)


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
@pytest.mark.parametrize("all_modules", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_guard_runs_first_whichever_module_is_imported_first(all_modules: bool) -> None:
    modules = [name for name, file in MODULES.items() if all_modules or IMPORTING.search(file.read_text())]
    found = first_imports(*modules, "timm.layers")
    assert found.pop("timm.layers") == 3  # the watch sees what it is there for
    assert set(found) == set(modules) and len(found) > 5
    assert not {name: code for name, code in found.items() if code}
