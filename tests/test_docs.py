"""What the documents promise exists: sections, files, links, commands, settings, imports, and the public furniture."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import yaml

from nearfar.launch.cli import build_parser
from nearfar.ssl import config
from nearfar.ssl.settings.finetune_settings import FinetuneRun
from nearfar.ssl.settings.listing import KEYS, all_settings
from nearfar.ssl.settings.run import Run

ROOT = Path(__file__).resolve().parents[1]
CODE = ("ssl", "eval", "launch", "bench", "tests", "examples", "docs")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SECTIONS = [name for name, value in Run.model_fields.items() if name in {key.split(".")[0] for key in KEYS}]
SUPERVISED = [setting.key for setting in all_settings(FinetuneRun)]
FILE_ENDINGS = {
    "py",
    "md",
    "yaml",
    "npz",
    "npy",
    "png",
    "svg",
    "json",
    "jsonl",
    "html",
    "safetensors",
    "beton",
    "tar",
    "txt",
    "log",
}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page_id(page: Path) -> str:
    return names(page)


def python_files() -> Iterator[Path]:
    for folder in CODE:
        yield from sorted((ROOT / folder).rglob("*.py"))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced or indented code block of a page; an indented one has no language."""
    text = page.read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE)
    return [*fenced, *(("", re.sub(r"^    ", "", block, flags=re.MULTILINE)) for block in indented)]


def inline(page: Path) -> list[str]:
    text = re.sub(r"^```\w*\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def lines(page: Path) -> list[str]:
    return [line.strip() for _, block in blocks(page) for line in block.splitlines()]


def snippets(page: Path) -> list[str]:
    """Every inline code of a page and every line of its code blocks."""
    return inline(page) + lines(page)


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` -> `a/b.py`, `a/c.py`."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def commands(code: list[str], program: str) -> list[list[str]]:
    """The arguments of every call of a program in some lines of code, without comments; a \\ goes on with the next."""
    found = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(code)).splitlines():
        if match := re.search(rf"(?:^|[ /]){re.escape(program)} (.*)", line):
            arguments = shlex.split(match[1], comments=True)
            if arguments and "..." not in arguments:
                found.append(arguments)
    return found


# --- sections, files, links ------------------------------------------------------------------------------------


def test_every_reference_to_a_section_finds_its_heading() -> None:
    headings = {page.name: set(re.findall(r"^## (\d+)\. ", page.read_text(), re.MULTILINE)) for page in PAGES}
    missing, found = [], 0
    for file in [*python_files(), *PAGES]:
        for page, section in re.findall(r"docs/(\w+\.md),? section (\d+)", " ".join(file.read_text().split())):
            found += 1
            if section not in headings.get(page, set()):
                missing.append(f"{names(file)}: docs/{page} has no section {section}")
    assert not missing, "\n".join(missing)
    assert found > 20, "the code no longer says where its formulas come from"


def test_nothing_cites_a_document_that_is_not_here() -> None:
    unknown = []
    for file in python_files():
        text = file.read_text()
        unknown += [
            f"{names(file)}: {page}" for page in re.findall(r"\bdocs/\w+\.md", text) if not (ROOT / page).is_file()
        ]
        if file != Path(__file__):
            unknown += [f"{names(file)}: {word}" for word in re.findall(r"\b(?:METHODS|DESIGN)(?:\.md| section)", text)]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_in_a_page_exist(page: Path) -> None:
    folders = "|".join((*CODE, "recipes"))
    named = re.findall(rf"(?<![\w./~-])(?:{folders})/[\w./{{}},*-]*[\w}}*/]", page.read_text())
    gone = [path for name in named for path in expanded(name) if not list(ROOT.glob(path.rstrip("/")))]
    assert not gone, f"{names(page)} names what is not in the tree: {', '.join(sorted(set(gone)))}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{names(page)} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{names(page)} links to {target}"


def test_the_design_names_every_module() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    named = {path for name in re.findall(r"(?:ssl|eval|launch)/[\w./{},]+\.py", text) for path in expanded(name)}
    modules = {names(file) for package in ("ssl", "eval", "launch") for file in (ROOT / package).rglob("*.py")}
    modules = {module for module in modules if not module.endswith("__init__.py")}
    assert modules <= named, f"add to docs/design.md: {', '.join(sorted(modules - named))}"


# --- commands, settings, code ----------------------------------------------------------------------------------


def command_id(case: object) -> str | None:
    return case if isinstance(case, str) else None


def command_cases(read: Callable[[Path], list[str]]) -> list[tuple[str, list[str]]]:
    return [(names(page), arguments) for page in PAGES for arguments in commands(read(page), "nearfar")]


@pytest.mark.parametrize(("page", "arguments"), command_cases(lines), ids=command_id)
def test_commands_parse(page: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        parsed = build_parser().parse_args(arguments)
    except SystemExit as end:
        code: object = end.code
        parsed = None
    else:
        code = 0
    assert code == 0, f"{page}: nearfar {shlex.join(arguments)}\n{capsys.readouterr().err}"
    for setting in getattr(parsed, "settings", None) or []:
        key = setting.partition("=")[0]
        supervised = arguments[0] == "finetune" or arguments[:2] == ["launch", "finetune"]
        keys = SUPERVISED if supervised else KEYS
        assert key in keys, f"{page}: nearfar {shlex.join(arguments)}: there is no setting {key}"


@pytest.mark.parametrize(("page", "arguments"), command_cases(inline), ids=command_id)
def test_commands_in_sentences_name_verbs_and_flags(
    page: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`nearfar launch --signal-delay` is no whole command, but verb and flag must be there."""
    verbs = arguments[:2] if arguments[0] == "data" or arguments[1:2] == ["status"] else arguments[:1]
    verbs = [] if verbs[0].startswith("-") else verbs
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([*verbs, "--help"])
    assert end.value.code == 0, f"{page}: nearfar {shlex.join(arguments)}\n{capsys.readouterr().err}"
    known = capsys.readouterr().out
    for flag in [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]:
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known), f"{page}: nearfar {shlex.join(arguments)}"


def test_the_readme_shows_the_commands_that_matter() -> None:
    verbs = {arguments[0] for arguments in commands(lines(ROOT / "README.md"), "nearfar")}
    assert verbs >= {"pretrain", "eval", "launch", "report"}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_scripts_and_their_flags_exist(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in commands(snippets(page), "python"):
        if not arguments[0].endswith(".py"):
            continue
        script = ROOT / arguments[0]
        assert script.is_file(), f"{names(page)}: {arguments[0]}"
        flags = [argument.partition("=")[0] for argument in arguments[1:] if argument.startswith("--")]
        if flags:
            monkeypatch.setattr(sys, "argv", [str(script), "--help"])
            monkeypatch.syspath_prepend(str(script.parent))  # as python itself does for a script
            with pytest.raises(SystemExit):
                runpy.run_path(str(script), run_name="__main__")
            known = capsys.readouterr().out
            assert not [flag for flag in flags if flag not in known], f"{names(page)}: {shlex.join(arguments)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    used = {arguments[0] for arguments in commands(snippets(page), "make") if arguments}
    assert used <= targets, f"{names(page)}: make {', '.join(sorted(used - targets))}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_settings_named_in_a_page_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names what settings were called before
        pytest.skip("old names are its subject")
    supervised = page.name == "finetuning.md"
    sections = "|".join([*SECTIONS, "augment", "classifier"] if supervised else SECTIONS)
    keys = [*KEYS, *SUPERVISED] if supervised else KEYS
    unknown = {
        f"{section}.{field}"
        for snippet in snippets(page)
        for section, field in re.findall(rf"(?<![\w./-])({sections})\.([a-z]\w*)", snippet)
        if field not in FILE_ENDINGS and f"{section}.{field}" not in keys
    }
    assert not unknown, f"{names(page)}: no such settings: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_recipes_in_a_page_are_valid(page: Path) -> None:
    for language, block in blocks(page):
        tree = yaml.safe_load(block) if language == "yaml" else None
        if isinstance(tree, dict) and set(tree) & set(SECTIONS):
            config.validate(tree)  # its error says what is wrong


def test_the_pages_hold_the_recipes_and_the_python_that_are_checked() -> None:
    """Otherwise the tests beside this one would look at nothing."""
    written = [block for page in PAGES for block in blocks(page)]
    assert any(re.search(rf"^({'|'.join(SECTIONS)}):", text, re.MULTILINE) for kind, text in written if kind == "yaml")
    assert any(re.search(r"^(from|import) nearfar", text, re.MULTILINE) for kind, text in written if kind == "python")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_in_a_page_imports_what_exists(page: Path) -> None:
    for language, block in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nearfar"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{names(page)}: {node.module} has no {alias.name}"


# --- the furniture of a public project -------------------------------------------------------------------------


def test_license_and_metadata_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    license_text = (ROOT / "LICENSE").read_text()
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in license_text and "Version 2.0, January 2004" in license_text
    assert project["authors"] == [{"name": citation["authors"][0]["name"]}]
    assert citation["version"] == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_file_is_complete() -> None:
    """The keys that the Citation File Format 1.2.0 asks for, in the work and in each reference."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    for work in citation["references"]:
        assert {"type", "title", "authors"} <= set(work), work
        assert all("family-names" in author or "name" in author for author in work["authors"]), work["title"]
        for identifier in work.get("identifiers", []):
            assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", identifier["value"]), work["title"]


def test_papers_of_the_methods_page_are_in_the_citation_file() -> None:
    cited = set(re.findall(r"arXiv:? ?(\d{4}\.\d{5})", " ".join((ROOT / "docs" / "methods.md").read_text().split())))
    listed = set(re.findall(r"arXiv:(\d{4}\.\d{5})", (ROOT / "CITATION.cff").read_text()))
    assert cited <= listed, f"missing in CITATION.cff: {sorted(cited - listed)}"


@pytest.mark.parametrize("package", ["ssl", "eval", "launch"])
def test_types_are_published(package: str) -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in tools["package-data"][f"nearfar.{package}"]


def test_figures_are_small() -> None:
    figures = [file for file in (ROOT / "docs" / "figures").iterdir() if file.suffix in {".svg", ".png"}]
    assert figures
    assert not {names(file): file.stat().st_size for file in figures if file.stat().st_size > 60_000}
