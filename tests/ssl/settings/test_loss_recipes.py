"""Bundles: what they stand for, that the user's word wins, and that contradictions are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.listing import KEYS
from nearfar.ssl.settings.loss_recipes import DINOV3, PARTS
from nearfar.ssl.settings.run import Run


def value(run: Run, key: str) -> object:
    section, _, name = key.partition(".")
    part = getattr(run, section)
    return getattr(part, name) if name else part


@pytest.mark.parametrize("name", PARTS)
def test_a_bundle_is_its_parts_and_nothing_else(name: str) -> None:
    bundled, plain = config.load(None, [f"loss.recipe={name}"]), config.load(None)
    for key in KEYS:
        if key == "name" or key == "folder":
            continue
        expected = PARTS[name].get(key, name if key == "loss.recipe" else value(plain, key))
        assert value(bundled, key) == expected, key


@pytest.mark.parametrize("key", DINOV3)
def test_every_part_can_be_set_alone_and_what_the_user_writes_wins(key: str) -> None:
    other = {
        "loss.centering": "centering", "head.ibot_separate": False, "optim.schedule": "cosine",
        "views.global_crops_scale": (0.4, 1.0), "views.local_crops_scale": (0.05, 0.4), "backbone.layer_scale": 0.5,
        "optim.layerwise_decay": 0.5, "optim.patch_embed_lr_mult": 0.5,
    }.get(key, 0.25)  # fmt: skip
    typed = ",".join(map(str, other)) if isinstance(other, tuple) else str(other).lower()
    run = config.load(None, ["loss.recipe=dinov3", f"{key}={typed}"])
    assert value(run, key) == other
    assert all(value(run, rest) == part for rest, part in DINOV3.items() if rest != key)


def test_a_file_says_the_recipe_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("loss: {recipe: dinov2, koleo_weight: 0.2}\noptim:\n")
    run = config.load(file, ["loss.recipe=dinov3", "optim.schedule=wsd"])
    assert (run.loss.koleo_weight, run.loss.gram_weight, run.optim.schedule) == (0.2, 2, "wsd")


def test_null_leaves_a_part_out() -> None:
    run = config.load(None, ["loss.recipe=dinov2", "backbone.layer_scale=null"])
    assert run.backbone.layer_scale is None and run.loss.ibot_weight == 1


def test_turning_ibot_off_takes_its_head_along() -> None:
    run = config.load(None, ["loss.recipe=dinov2", "loss.ibot_weight=0"])
    assert not run.head.ibot_separate and run.loss.koleo_weight == 0.1


@pytest.mark.parametrize("setting", ["backbone.weights=some.pth", "backbone.pretrained=true"])
def test_starting_weights_decide_on_layer_scale(setting: str) -> None:
    backbone = ["backbone.name=timm/vit_small_patch16_224"]
    run = config.load(None, ["loss.recipe=dinov2", *backbone, setting])
    assert run.backbone.layer_scale is None and run.optim.layerwise_decay == 0.9
    loaded = config.load(None, ["loss.recipe=dinov2", *backbone, setting, "backbone.layer_scale=1e-5"])
    assert loaded.backbone.layer_scale == 1e-5


def test_a_run_that_was_resolved_and_written_down_is_read_as_it_is() -> None:
    for schedule in ("cosine", "constant", "wsd"):
        run = config.load(None, ["loss.recipe=dinov3", f"optim.schedule={schedule}", "train.epochs=10"])
        resolved, _ = resolve(run, 2_000)
        tree = yaml.safe_load(config.to_yaml(resolved))
        assert config.validate(tree).model_dump() == resolved.model_dump()
        again, derived = resolve(run, 2_000, saved=config.validate(tree))
        assert again.model_dump() == resolved.model_dump() and derived == []
    assert resolved.loss.gram_start_epoch == 8 and resolved.optim.cooldown_epochs == 2
    assert resolved.head.ibot_prototypes == resolved.head.prototypes
    assert resolved.optim.weight_decay_end == resolved.optim.weight_decay
    assert resolved.optim.teacher_momentum_end == resolved.optim.teacher_momentum


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["head.ibot_separate=true"], r"settings of iBOT, which loss\.ibot_weight=0 turns off"),
        (["loss.ibot_weight=1", "head.ibot_prototypes=9"], r"needs a separate head for patches"),
        (["loss.mask_ratio_min_max=0.5,0.1"], r"two rising shares above 0, at most 1, not \[0\.5, 0\.1\]"),
        (["loss.mask_ratio_min_max=0.5,1.1"], r"two rising shares"),
        (["loss.gram_start_epoch=3"], r"settings of Gram anchoring, which loss\.gram_weight=0 turns off"),
        (["loss.gram_weight=1", "loss.gram_start_epoch=100"], r"gram_start_epoch=100 is not within the run"),
        (["loss.gram_weight=1", "loss.gram_teacher_epoch=90"], r"gram_teacher_epoch=90 is later than .*start_epoch=80"),
        (
            ["loss.gram_weight=1", "loss.gram_teacher_epoch=9", "loss.gram_teacher=a.pth"],
            r"gram_teacher and loss\.gram_teacher_epoch both say",
        ),
        (
            ["optim.schedule=constant", "optim.weight_decay_end=0.4"],
            r"weight_decay_end=0\.4 needs optim\.schedule=cosine",
        ),
        (
            ["optim.schedule=constant", "optim.teacher_momentum=0.99", "optim.teacher_momentum_end=1"],
            r"teacher_momentum_end=1 needs optim\.schedule=cosine.*teacher_momentum_end=null",
        ),
        (["loss.recipe=dinov3", "optim.weight_decay_end=0.4"], r"weight_decay_end=0\.4 needs optim\.schedule=cosine"),
        (["optim.cooldown_epochs=3"], r"cooldown_epochs is a setting of optim\.schedule=wsd, not of cosine"),
        (
            ["optim.schedule=wsd", "optim.cooldown_epochs=60", "optim.warmup_epochs=50"],
            r"warmup_epochs=50 and optim\.cooldown_epochs=60 together are longer than the run",
        ),
        (["optim.schedule=wsd", "optim.cooldown_epochs=101"], r"cooldown_epochs=101 is longer than the run"),
        (["loss.recipe=dinov4"], r"loss\.recipe='dinov4' is not possible"),
        (["loss=dinov2"], "loss"),
    ],
)
def test_contradictions_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(None, ["train.epochs=100", *settings])
