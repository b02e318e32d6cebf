"""`nearfar demo`: its flags."""

from __future__ import annotations

import argparse

from rich.console import Console

from nearfar.launch.verbs.command_line import add_settings


def add_demo(verbs: argparse._SubParsersAction) -> None:
    """Put `demo` among the verbs of the `nearfar` command."""
    demo = verbs.add_parser("demo", help="pretrain and score on drawn scenes: minutes, no download")
    demo.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and views (default 0)")
    add_settings(demo)
    demo.set_defaults(verb=run_demo)


def run_demo(arguments: argparse.Namespace) -> None:
    from nearfar.launch.demo import demo

    demo(arguments.seed, arguments.settings, Console())
