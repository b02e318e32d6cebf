"""The code is laid out as docs/design.md draws it: names, floors, sizes, and nothing that unpickles."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"nearfar.ssl": ROOT / "ssl", "nearfar.eval": ROOT / "eval", "nearfar.launch": ROOT / "launch"}

# Ground floor first. A module imports from floors below its own, and from its own floor without going in a circle.
FLOORS: list[set[str]] = [
    {"errors", "wording", "patches"},
    {"disk"},
    {"backbones"},
    {"settings", "config"},
    {"parallel"},
    {"heads"},
    {"data"},
    {"learning"},
    {"checkpoint", "given_weights"},
    {"run"},
    {"training"},
    {"train", "replay"},
    {"eval/features"},
    {"eval"},
    {"eval/scores", "eval/pictures"},
    {"eval/pages"},
    {"launch"},
]


def modules() -> dict[str, Path]:
    """Import name -> file, for every module of the package."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def floor(module: str) -> int:
    """Which floor a module is on: `ssl`'s by their folder, or file where they are in none, `eval`'s by their folder."""
    _, package, name, *inside = module.split(".")
    if package != "ssl":
        in_folder = package == "eval" and (inside or (ROOT / package / name).is_dir())
        name = f"{package}/{name}" if in_folder else package
    for number, names in enumerate(FLOORS):
        if name in names:
            return number
    raise AssertionError(f"{module} is on no floor: add '{name}' to FLOORS here and to the table of the design")


def imports(module: str, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of ours that a module imports, anywhere in it, each with its line."""
    for node in ast.walk(ast.parse(known[module].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nearfar":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{known[module]}:{node.lineno}: relative import; write nearfar.*"
            if (node.module or "").split(".")[0] == "nearfar":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield (inner if inner in known else str(node.module)), node.lineno


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


# --- names -----------------------------------------------------------------------------------------------------


def test_the_folder_ssl_is_never_a_package_by_itself() -> None:
    assert not (ROOT / "ssl" / "__init__.py").exists()


def test_python_from_the_root_still_finds_its_tls_module() -> None:
    result = run(sys.executable, "-c", "import ssl; ssl.SSLContext; print(ssl.__file__)")
    assert result.returncode == 0, result.stderr
    assert not result.stdout.startswith(str(ROOT))


def test_torchrun_from_the_root_still_finds_the_tls_module(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import ssl; ssl.SSLContext; import nearfar.ssl.config; print('both')")
    result = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script),
        OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "both" in result.stdout


def test_packages_list_equals_the_tree(pyproject: dict) -> None:
    folders = {"nearfar.ssl"}  # without an __init__.py, on purpose
    for package, root in PACKAGES.items():
        for marker in root.rglob("__init__.py"):
            folders.add(".".join([package, *marker.parent.relative_to(root).parts]))
        with_code = {file.parent for file in root.rglob("*.py")} - {ROOT / "ssl"}
        assert all((folder / "__init__.py").exists() for folder in with_code)
    if any((ROOT / "recipes").glob("*.yaml")):
        folders.add("nearfar.recipes")
    assert set(pyproject["packages"]) == folders
    for package in folders:
        top = ".".join(package.split(".")[:2])
        assert pyproject["package-dir"][top] == top.removeprefix("nearfar.")


def test_a_wheel_imports_without_the_repository(tmp_path: Path, pyproject: dict) -> None:
    """Built from a copy, so that no build folder appears in the working tree (and no stale one is packed)."""
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    source.mkdir()
    tracked = [*pyproject["package-dir"].values(), "pyproject.toml", "README.md"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in tracked), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(source))
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    installed = run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert installed.returncode == 0, installed.stderr

    # -S keeps the editable install's import hook out; the site-packages of the dependencies come back by hand.
    code = (
        "import sys, site; sys.path[:0] = [sys.argv[1]]; sys.path += sys.argv[2:]\n"
        "import importlib, ssl; ssl.SSLContext\n"
        "for name in open(0).read().split(): print(importlib.import_module(name).__file__)"
    )
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(target), *paths],
        input="nearfar.ssl.config nearfar.ssl.backbones.factory nearfar.ssl.heads.dino nearfar.eval.pages.curves "
        "nearfar.launch.cli",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(target)) for line in result.stdout.splitlines()), result.stdout
    packed = {str(file.relative_to(target)) for file in (target / "nearfar").rglob("*.py")}
    tree = {f"nearfar/{file.relative_to(ROOT)}" for file in modules().values()}
    assert {name for name in packed if not name.startswith("nearfar/recipes")} == tree


# --- floors ----------------------------------------------------------------------------------------------------


def test_imports_only_point_down() -> None:
    known = modules()
    upward = [
        f"{known[module].relative_to(ROOT)}:{line} imports {other} from a floor above"
        for module in known
        if module != "nearfar.ssl"
        for other, line in imports(module, known)
        if floor(other) > floor(module)
    ]
    assert not upward, "\n".join(upward)


def test_no_imports_in_a_circle() -> None:
    known = modules()
    graph = {module: {other for other, _ in imports(module, known)} - {module} for module in known}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["utils.py", "util.py", "helpers.py", "misc.py"])
def test_no_drawer_for_everything(name: str) -> None:
    assert not [file for file in modules().values() if file.name == name]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, its docstring among them."""
    return (function.end_lineno or 0) - function.lineno + 1


@pytest.mark.parametrize("folder", ["ssl", "eval", "launch", "bench", "examples", "tests"])
def test_every_function_can_be_read_at_once(folder: str) -> None:
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has {lines_of(node)} lines"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > 60
    ]
    assert not long, "\n".join(long)


# --- loading ---------------------------------------------------------------------------------------------------


def unsafe_loads(code: str) -> list[str]:
    """Ways of reading a file that can run what is in it."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        found += [
            f"imports {n}" for n in names if n.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
        ]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"torch.load", "torch.hub.load"} and given.get("weights_only") != "True":
            found.append(f"{called} without weights_only=True")
        if called.endswith(("_object", "_object_list")):
            found.append(f"{called} unpickles what other processes send")
        if given.get("allow_pickle", "False") != "False":
            found.append(f"{called} with allow_pickle")
        if called.startswith("yaml.") and called in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
            found.append(called)
    return found


def test_nothing_unpickles() -> None:
    found = {str(file.relative_to(ROOT)): unsafe_loads(file.read_text()) for file in modules().values()}
    assert not {name: ways for name, ways in found.items() if ways}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "dist.broadcast_object_list(x)",
        "dist.all_gather_object(x, y)",
    ],
)
def test_the_search_for_unsafe_loads_finds_them(code: str) -> None:
    assert unsafe_loads(code)
    assert not unsafe_loads("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); yaml.safe_load(f)")
