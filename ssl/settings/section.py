"""What every section of settings is: typed, strict and frozen, and which of its settings may change on the way."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

# Settings marked like this may differ when a run is continued: they do not change a single weight.
MAY_CHANGE: dict[str, JsonValue] = {"resume": "free"}


def _numbers(value: Any) -> Any:
    """Numbers separated by commas, in whatever brackets: 0.4,1.0 and (0.4, 1.0) are [0.4, 1.0]."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.strip().removeprefix("(").removesuffix(")").strip("[] ").split(",")]


Range = Annotated[tuple[float, float], BeforeValidator(_numbers)]  # a range: lowest, highest
ViewProbs = Annotated[tuple[float, float, float], BeforeValidator(_numbers)]  # first global, second global, local views


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )
