"""The architecture that a file of weights describes: only what `create` itself could have written is built from it.

A file comes from anywhere. Its description must not choose weights to fetch, files to read or a network larger than
the tensors beside it, so keys, types and bounds are checked here, and building stops at what the file can fill.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nearfar.ssl.backbones.factory import OUR_NAME, VIM_NAME, create
from nearfar.ssl.backbones.tokens import Backbone, one_line
from nearfar.ssl.errors import UserError

TIMM_NAME = re.compile(r"timm/[A-Za-z0-9_.-]{1,100}")  # no colon, no second slash: neither a URL nor a path
SPARE = 2**26  # numbers that a network may hold beyond twice the file's: for dropped heads and recomputed tables


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and any(form.fullmatch(value) for form in (OUR_NAME, VIM_NAME, TIMM_NAME))


# What a description may hold: a check of the value, and what is valid, in words.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_name, "the name of a backbone of ours or of timm's (timm/NAME)"),
    "img_size": (_integer(1, 4096), "a whole number from 1 to 4096"),
    "pos_size": (_integer(1, 4096), "a whole number from 1 to 4096"),
    "pos_antialias": (_is_bool, "true or false"),
    "no_positions": (_is_bool, "true or false"),
    "patch_size": (_integer(1, 256), "a whole number from 1 to 256"),
    "embed_dim": (_integer(1, 8192), "a whole number from 1 to 8192"),
    "depth": (_integer(1, 256), "a whole number from 1 to 256"),
    "num_heads": (_integer(1, 1024), "a whole number from 1 to 1024"),
    "registers": (_integer(0, 1024), "a whole number from 0 to 1024"),
    "lgp": (_is_bool, "true or false"),
    "gaug": (_is_bool, "true or false"),
    "prr": (_is_bool, "true or false"),
    "rope": (_is_bool, "true or false"),
    "levels": (lambda value: value == "auto" or _integer(1, 6)(value), "auto, or a whole number from 1 to 6"),
    "wavelet": (
        lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9.]{1,16}", value) is not None,
        "the name of a wavelet",
    ),
    "mask_token": (_is_bool, "true or false"),
    "layer_scale": (lambda value: type(value) in (int, float) and 0 < value <= 1e3, "a number from above 0 to 1000"),
    "drop_path": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"),
}
NAMED_PATCH = 256  # pixels; a patch size inside a name, such as vit_tiny_patch16, is bounded as one of its own


def create_described(arch: Any, tensors: Mapping[str, Tensor], where: str) -> Backbone:
    """The untrained backbone that the description `arch` in the file `where` names, to take `tensors` (not loaded).

    `arch` is what `Backbone.arch` was, or anything at all. Nothing is downloaded and no other file is read; building
    stops as soon as the network holds more than twice the numbers of `tensors` and `SPARE` more.

    Raises:
        UserError: unknown keys, values of another type or out of bounds, or a network that `tensors` cannot fill.
    """
    checked = check_described(arch, where)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    try:
        with _at_most(2 * numbers + SPARE, where):
            return create(**checked)
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where} describes a network that cannot be built: {error}") from None
    except (RuntimeError, MemoryError, TypeError, ValueError, AssertionError, ArithmeticError, LookupError) as error:
        reason = one_line(str(error), 200) or type(error).__name__
        raise UserError(f"{where} describes a network that cannot be built: {reason}. Export it again.") from None


def check_described(arch: Any, where: str) -> dict[str, Any]:
    """`arch` if it is a dictionary of settings of `create` within bounds (`KEYS`).

    Raises:
        UserError: naming every key and value that is not.
    """
    if not isinstance(arch, dict) or "name" not in arch:
        raise UserError(f"{where} does not say which architecture it holds. Export the backbone again.")
    wrong = []
    for key, value in arch.items():
        valid, requirement = KEYS.get(key, (None, ""))
        if valid is None:
            wrong.append(f"{one_line(str(key), 40)!r} is not part of an architecture")
        elif not valid(value):
            wrong.append(f"{key} is {one_line(repr(value)[:200], 60)}, and should be {requirement}")
    named = re.search(r"_patch(\d{1,9})", str(arch["name"])[:120])
    if not wrong and not arch["name"].startswith("timm/") and named and int(named[1]) > NAMED_PATCH:
        wrong.append(f"a patch size of {named[1]} pixels is more than {NAMED_PATCH}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"The architecture that {where} describes is not one that nearfar writes: {'; '.join(wrong[:5])}{more}. "
            "The file is damaged or was made by something else; export the backbone again."
        )
    return dict(arch)


@contextmanager
def _at_most(numbers: int, where: str) -> Iterator[None]:
    """Within this context modules register at most `numbers` numbers, counted before they are initialized."""
    held = 0

    def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal held
        held += 0 if tensor is None else tensor.numel()
        if held > numbers:
            raise UserError(
                f"The architecture that {where} describes is far larger than the weights in it ({numbers:,} numbers "
                "would have sufficed), so it was not built. The file is damaged or was made by something else."
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
