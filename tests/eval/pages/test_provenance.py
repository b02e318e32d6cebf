"""Where weights come from, as a run's page tells it."""

from __future__ import annotations

from typing import Any

import pytest

from nearfar.eval.pages.provenance import lineage_section


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": {"name": "vit_tiny_patch16"}}, "random weights of the seed"),
        ({"backbone": {"name": "vit_tiny_patch16", "weights": "runs/a&b"}}, "runs/a&amp;b"),
        ({"backbone": {"name": "timm/resnet18", "pretrained": True}}, "timm&#x27;s weights of timm/resnet18"),
        ({"backbone": {"name": "vit_tiny_patch16"}, "train": {"start_from": "runs/x@12"}}, "runs/x@12"),
    ],
)
def test_it_says_what_the_training_started_from(settings: dict[str, Any], message: str) -> None:
    assert message in lineage_section(settings, [], {})
