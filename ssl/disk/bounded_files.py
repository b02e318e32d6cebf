"""Untrusted text and YAML, read within bounds: a hostile or damaged file ends in an error, not in exhausted memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nearfar.ssl.errors import UserError

MAX_BYTES = 2**20
MAX_VALUES = 10_000  # every alias counted as often as it is used
MAX_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """SafeLoader that stops at the bounds above, and keeps dates as text."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            values, depth = _extent(node, {}, set())
            if values > MAX_VALUES:
                raise yaml.YAMLError(f"it holds more than {MAX_VALUES:,} values")
            if depth > MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        return node


_Loader.yaml_implicit_resolvers = {  # a run may be called 2026-11-21
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file. Raises OSError, and ValueError where it is longer than `max_bytes` or not UTF-8."""
    if path.stat().st_size > max_bytes:
        raise ValueError(f"it is longer than {max_bytes // 2**20} MiB")
    return path.read_text(encoding="utf-8")


def read_format(path: Path, most: int, name: str) -> dict[str, Any]:
    """A JSON object that says under "format" that it is `name`. Raises OSError, or ValueError for anything else."""
    content = json.loads(read_text(path, most))
    if not isinstance(content, dict) or content.get("format") != name:
        raise ValueError(f'it does not begin with "format": "{name}"')
    return content


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        yaml.YAMLError: it is not YAML, or exceeds the bounds.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has more than {MAX_BYTES:,} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, TypeError, RecursionError) as error:  # such as a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def read_yaml(path: Path, what: str, holding: str = "sections such as 'data:' and 'train:'") -> dict[Any, Any]:
    """The sections of a YAML file; nothing for an empty one.

    what: what the file is to the user, such as "recipe". holding: what belongs in it.

    Raises:
        UserError: it is not there, cannot be read, is not YAML, exceeds the bounds, or holds no sections.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        tree = parse_yaml(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} {path} cannot be read: it is not UTF-8 text (byte {error.start:,}).") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The {what} {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The {what} {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        shown = repr(tree)
        shown = shown if len(shown) <= 80 else f"{shown[:80]} ..."
        raise UserError(f"The {what} {path} must hold {holding}, not {shown}.")
    return tree


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested, with aliases expanded."""
    if id(node) in above:
        raise yaml.YAMLError("it contains itself")
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        extents = [_extent(part, known, above | {id(node)}) for part in parts]
        known[id(node)] = 1 + sum(values for values, _ in extents), 1 + max((depth for _, depth in extents), default=0)
    return known[id(node)]
