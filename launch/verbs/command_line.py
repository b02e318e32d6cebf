"""Reading a command line: settings anywhere among the flags, and the nearest right word for a wrong one."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nearfar.launch.failures import print_paragraph
from nearfar.launch.recipes import bundled
from nearfar.ssl.errors import EXIT_USER
from nearfar.ssl.settings.messages import meant, nearest

if TYPE_CHECKING:
    from nearfar.ssl.settings.run import AnyRun


class Parser(argparse.ArgumentParser):
    """argparse with plainer messages. With `takes_settings`, `key=value` may stand before, between or after flags."""

    takes_settings = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(args or [])
        if not self.takes_settings or {"-h", "--help"} & set(words):
            return super().parse_known_args(words, namespace)
        self.takes_settings = False  # the method below comes back here
        try:
            return self.parse_known_intermixed_args(words, namespace)
        finally:
            self.takes_settings = True

    def error(self, message: str) -> NoReturn:
        """End with the usage and the mistake, in words of our own where argparse's are hard to read."""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w-]+", wrong[2])
            message = f"'{wrong[1]}' is not one of {', '.join(choices)}{_did_you_mean(meant(wrong[1], choices))}"
        elif missing := re.search(r"the following arguments are required: (.*)", message):
            names = [name for name in missing[1].split(", ") if name != "key=value"]
            verb, last = ("is", names[-1]) if len(names) == 1 else ("are", f"{', '.join(names[:-1])} and {names[-1]}")
            message = f"{last} {verb} missing; see `{self.prog} --help`"
        self.print_usage(sys.stderr)
        _end(message)


def check_verb(parser: argparse.ArgumentParser, words: Sequence[str], verbs: Sequence[str]) -> None:
    """End with a hint when the first word is no verb."""
    if not words:
        parser.exit(EXIT_USER, parser.format_help())
    word = words[0]
    if word in verbs or word in ("-h", "--help", "--version"):
        return
    if word.startswith("-"):
        verb = next((each for each in words if each in verbs), "VERB")
        _end(f"The verb comes first: write `nearfar {verb} ...`, then {word}. There are {', '.join(verbs)}")
    if word.endswith((".yaml", ".yml")) or word in bundled():
        parser.error(f"The verb is missing: to train with this recipe, write `nearfar pretrain {word}`")
    if "=" in word:
        parser.error(f"The verb is missing: settings follow it, as in `nearfar pretrain RECIPE {word}`")
    near = _did_you_mean(nearest(word, verbs))
    parser.error(f"There is no verb '{word}'{near or '; there are ' + ', '.join(verbs)}")


def refuse_leftover(words: Sequence[str], left: Sequence[str]) -> NoReturn:
    """End with what each unrecognized word may have meant: `--epochs 3` is train.epochs=3."""
    from nearfar.ssl.settings.listing import KEYS
    from nearfar.ssl.settings.messages import nearest_setting

    problems = []
    for flag in (word for word in left if word.startswith("-")):
        name, sign, value = flag.lstrip("-").partition("=")
        key = nearest_setting(name.replace("-", "_"), KEYS)
        if not sign:
            after = words[words.index(flag) + 1 :][:1]
            value = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else "VALUE"
        hint = f"; the setting is written {key}={value}" if key else ""
        problems.append(f"{flag.partition('=')[0]} is not a flag of `nearfar {words[0]}`{hint}")
    problems = problems or [f"'{' '.join(left)}' is not expected by `nearfar {words[0]}`"]
    _end(f"{'. '.join(problems)}. See `nearfar {words[0]} --help`")


def _end(message: str) -> NoReturn:
    print_paragraph(message if message.endswith("?") else f"{message}.")
    raise SystemExit(EXIT_USER)


def version() -> str:
    """The versions of this package and of those that its numbers depend on, without importing them."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed
    from platform import python_version

    found = []
    for name in ("nearfar", "torch", "torchvision", "timm", "ffcv"):
        try:
            found.append(f"{name} {installed(name)}")
        except PackageNotFoundError:
            continue
    return f"{found[0]} ({', '.join([*found[1:], f'Python {python_version()}'])})"


class ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(version())
        parser.exit()


class HelpWithSettings(argparse.Action):
    """The help of a verb, and every setting with its default and meaning."""

    @staticmethod
    def kind() -> type[AnyRun]:
        """Whose settings these are."""
        from nearfar.ssl.settings.run import Run

        return Run

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(parser.format_help() + "\n" + settings_help(shutil.get_terminal_size().columns, self.kind()))
        parser.exit()


def settings_help(width: int, kind: type[AnyRun]) -> str:
    """Every setting of a kind of run as it may be typed, with its meaning below, wrapped to `width`."""
    from nearfar.ssl.settings.listing import all_settings

    def wrapped(text: str, indent: int) -> str:
        return textwrap.fill(
            text, max(width, 40) - 1, initial_indent=" " * indent, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    lines = [
        "settings:",
        wrapped(
            "Written key=value, or in the sections of a recipe. Shown with their defaults; a derived one depends on "
            "the number of images, the length of the run or the machine, and the run says why when it starts.",
            2,
        ),
        "",
    ]
    section = ""
    for setting in all_settings(kind):
        if section != (section := setting.key.rpartition(".")[0]):
            lines.append("")
        default = f"  {setting.typed}" if setting.default is None else f"={setting.typed}"
        lines += [f"  {setting.key}{default}", wrapped(f"{setting.description} [{setting.type}]", 6)]
    return "\n".join(lines)


def _did_you_mean(near: str | None) -> str:
    return f"; did you mean {near}?" if near else ""


def add_settings(parser: Any) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as train.epochs=20")
    parser.takes_settings = True


def add_model(parser: argparse.ArgumentParser, also: str = "") -> None:
    files = "exported .safetensors, a file of public weights (DINO, DINOv2, DINOv3, timm) or timm/NAME"
    parser.add_argument("model", type=Path, help=f"run folder, checkpoint folder, {files}{also}")


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: eval.size of the run)")
    parser.add_argument("--resize", type=int, help="shorter side before the center crop (default: eval.resize)")
    parser.add_argument(
        "--layer",
        help="final, last-block or blocks-N (default: final; last-block for segment, as LocAt reads it); for "
        "`eval linear` also several, as in final,blocks-4, of which held-out training images choose one; for "
        "`features` several are written each to OUT/LAYER, from one pass over the images",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to compute (default auto: a GPU if there is one, else the CPU)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="threads or processes that decode images; 0: the main process does (default: by cores and device)",
    )
