"""Words for mistakes: pydantic's errors once each and in plain words, and the nearest right name."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from nearfar.ssl.settings.messages import Mistake, in_words, nearest, nearest_setting, unknown


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int | Literal["auto"] = "auto"
    pair: tuple[float, float] = (0.0, 1.0)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inner: Inner = Inner()
    count: int = 1


KEYS = ["inner.size", "inner.pair", "count"]


def mistakes(tree: dict[str, object]) -> list[Mistake]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(tree)
    return in_words(caught.value, KEYS, "nearfar something")


def test_one_mistake_for_each_value_however_many_kinds_it_could_have() -> None:
    found = mistakes({"inner": {"size": "big", "pair": ["a", "b"]}, "count": None})
    assert [mistake.path for mistake in found] == [("inner", "size"), ("inner", "pair"), ("count",)]
    assert found[0].message == "inner.size='big' is not possible: it should be a whole number, or it should be 'auto'"
    assert all("input" not in mistake.message for mistake in found)


def test_an_unknown_name_says_the_nearest_or_whose_help_to_read() -> None:
    (near,), (far,) = mistakes({"inner": {"sise": 3}}), mistakes({"xyzzy": 3})
    assert near == Mistake(("inner", "sise"), "inner.sise is unknown (did you mean inner.size?)")
    assert far.message == "xyzzy is unknown (see `nearfar something --help`)"


def test_nearest_names() -> None:
    assert nearest("pretrian", ["pretrain", "report"]) == "pretrain"
    assert nearest("qqq", ["pretrain", "report"]) is None
    assert nearest_setting("siez", KEYS) == "inner.size"
    assert "see `nearfar pretrain --help`" in unknown("q" * 10_000, KEYS)
