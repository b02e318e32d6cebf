"""Settings: all mistakes told at once, with what to do; defaults that follow the data; one file that holds it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nearfar.ssl import config
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings import defaults
from nearfar.ssl.settings.defaults import local_ranks, resolve
from nearfar.ssl.settings.listing import NEVER_DERIVED, all_settings
from nearfar.ssl.settings.run import Run


def mistakes(*overrides: str, recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        config.load(recipe, overrides)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


# Reading


def test_a_recipe_is_named_after_its_file_and_overridden_by_key_and_value(tmp_path: Path) -> None:
    recipe = write(tmp_path, "train: {epochs: 7, batch_size: 8}\nbackbone: {lgp: true}\n")
    run = config.load(recipe, ["train.epochs=9", "views.blur_prob=[1, 0, 0.5]", "data.val=null"])
    assert (run.name, run.train.epochs, run.train.batch_size) == ("mine", 9, 8)
    assert run.backbone.lgp and run.views.blur_prob == (1, 0, 0.5) and run.data.val is None
    assert config.load(recipe, ["name=other"]).name == "other"


def test_nothing_given_is_dino_as_published() -> None:
    run = config.load(None)
    assert run == Run()
    assert run.views.local_crops_number == 8 and run.optim.clip_grad == 3.0 and run.backbone.drop_path == 0.1


@pytest.mark.parametrize("written", ["1e-4", "'1e-4'", "0.0001", "1.0e-4"])
def test_scientific_notation_is_a_number_though_yaml_calls_it_text(written: str) -> None:
    assert config.load(None, [f"optim.lr={written}"]).optim.lr == 1e-4


def test_an_equals_sign_may_stand_in_a_value() -> None:
    assert config.load(None, ["data.path=a=b"]).data.path == "a=b"


def test_an_empty_recipe_and_an_empty_section_are_fine(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, "")).name == "mine"
    recipe = write(tmp_path, "data:\n  # path: later\ntrain:\n  epochs: 3\n")
    assert config.load(recipe, ["data.path=x"]).data.path == "x"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a\n- b\n", "must hold sections"),
        (b"just words", "must hold sections"),
        (b"train: {epochs: 3", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "cannot be read"),
        (b"text with \x00 in it", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_as_such(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    message = mistakes(recipe=file)
    assert expected in message and str(file) in message


def test_a_missing_recipe_and_a_folder(tmp_path: Path) -> None:
    assert "There is no recipe" in mistakes(recipe=tmp_path / "no.yaml")
    assert "cannot be read" in mistakes(recipe=tmp_path)


# Mistakes


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    recipe = write(tmp_path, "trian: {epochs: 3}\ntrain: {epochs: -1, seed: one}\nviews: {global_crops_size: 225}\n")
    message = mistakes("optim.lrr=1", "optim.min_lr=-1", "nonsense", "optim.warmup_epochs=200", recipe=recipe)
    assert message.startswith("8 mistakes in the settings: ")
    for part in (
        "trian is unknown (did you mean train?)",
        "train.epochs=-1",
        "train.seed='one'",
        "views.global_crops_size=225 is not a multiple of the patch size 16 (nearest: 224)",
        "optim.lrr is unknown (did you mean optim.lr?)",
        "optim.min_lr=-1",
        "'nonsense' is not a setting",
        "optim.warmup_epochs=200 is longer than the run",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trian.epochs=3", "train"),
        ("heads.hidden=3", "head"),
        ("training.epochs=3", "train"),
        ("evaluation.size=3", "eval"),
        ("epochs=3", "train.epochs"),
        ("seed=3", "train.seed"),
        ("batchsize=3", "train.batch_size"),
        ("train.epoch=3", "train.epochs"),
        ("train.lr=3", "optim.lr"),
        ("head.prototyps=3", "head.prototypes"),
        ("views.solarise_threshold=3", "views.solarize_threshold"),
        ("optim.warmup=3", "optim.warmup_epochs"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    assert f"(did you mean {right}?)" in mistakes(wrong)


def test_a_name_like_nothing_points_to_the_help() -> None:
    assert "xyzzy is unknown (see `nearfar pretrain --help`)" in mistakes("xyzzy.q=1")


def test_keys_that_are_no_text(tmp_path: Path) -> None:
    message = mistakes(recipe=write(tmp_path, "5: 2\ntrain: {3: 4}\nyes: no\n"))
    assert "5 is unknown" in message and "train.3 is unknown" in message and "True is unknown" in message


@pytest.mark.parametrize(
    "setting",
    [
        "train.batch_size=1",
        "train.batch_size=3.5",
        "train.epochs=many",
        "train.device=gpu",
        "train.precision=fp8",
        "optim.lr=0",
        "optim.lr=.nan",
        "optim.weight_decay=.inf",
        "views.hflip_prob=1.5",
        "views.hue=0.6",
        "views.global_crops_scale=[0.4]",
        "views.blur_prob=[1, 0.1]",
        "backbone.drop_path=1",
        "backbone.lgp=perhaps",
        "head.prototypes=1",
        "loss.student_temp=0",
        "data.workers=-1",
        "optim=3",
        "train.epochs=",
    ],
)
def test_bad_types_and_ranges(setting: str) -> None:
    message = mistakes(setting)
    assert message.startswith("A mistake in the settings: ") and "is not possible" in message
    assert setting.partition("=")[0] in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["views.global_crops_size=100"],
            "views.global_crops_size=100 is not a multiple of the patch size 16 (nearest: 96)",
        ),
        (["views.local_crops_size=90"], "views.local_crops_size=90 is not a multiple"),
        (
            ["backbone.patch_size=14", "views.local_crops_number=0", "views.global_crops_size=225"],
            "patch size 14 (nearest: 224)",
        ),
        (["views.global_crops_size=64"], "local views (96 px) are larger than global ones (64 px)"),
        (["views.global_crops_scale=[0.4, 1.2]"], "cannot exceed 1"),
        (["views.local_crops_scale=[0.5, 0.2]"], "views.local_crops_scale must be two rising numbers above 0"),
        (["views.ratio=[0, 1]"], "views.ratio must be two rising numbers"),
        (["views.blur_sigma=[2, 1]"], "views.blur_sigma must be two rising numbers"),
        (["views.blur_prob=[1, 2, 0]"], "views.blur_prob must be probabilities"),
        (["views.solarize_prob=[0, -1, 0]"], "views.solarize_prob must be probabilities"),
        (["train.epochs=5", "optim.warmup_epochs=6"], "optim.warmup_epochs=6 is longer than the run (train.epochs=5)"),
        (["train.epochs=5", "loss.warmup_teacher_temp_epochs=6"], "loss.warmup_teacher_temp_epochs=6 is longer"),
        (["train.epochs=5", "optim.freeze_last_layer_epochs=6"], "optim.freeze_last_layer_epochs=6 is longer"),
        (["backbone.pretrained=true"], "backbone.pretrained needs a timm/NAME backbone"),
        (["backbone.embed_dim=100", "backbone.num_heads=3"], "is not divisible by num_heads=3"),
        (["eval.size=64", "eval.resize=32"], "eval.resize=32 is smaller than the crop eval.size=64"),
        (["eval.resize=100"], "eval.resize=100 is smaller than the crop eval.size=224"),
        (["name=a/b"], "must be a plain folder name"),
        (["name=.."], "must be a plain folder name"),
    ],
)
def test_impossible_combinations(settings: list[str], expected: str) -> None:
    message = mistakes(*settings)
    assert message.startswith("A mistake in the settings: ") and expected in message and "?." not in message


def test_what_does_not_apply_is_no_mistake() -> None:
    no_local_views = ["views.local_crops_number=0", "views.local_crops_size=90"]
    no_patches = ["backbone.name=timm/resnet18", "views.global_crops_size=100", "backbone.pretrained=true"]
    assert config.load(None, no_local_views).views.local_crops_size == 90
    assert config.load(None, no_patches).views.global_crops_size == 100
    # where they do apply, the same sizes are mistakes
    assert "views.local_crops_size=90" in mistakes(no_local_views[1])
    assert "views.global_crops_size=100" in mistakes(no_patches[1])


# What may be typed


@pytest.mark.parametrize("typed", ["0.4,1.0", "(0.4, 1.0)", "[0.4, 1.0]", "'0.4, 1'", "[0.4,1]", "( .4, 1 )"])
def test_ranges_may_be_typed_with_any_brackets_or_none(typed: str, tmp_path: Path) -> None:
    assert config.load(None, [f"views.global_crops_scale={typed}"]).views.global_crops_scale == (0.4, 1.0)
    recipe = write(tmp_path, f"views:\n  global_crops_scale: {typed}\n")
    assert config.load(recipe).views.global_crops_scale == (0.4, 1.0)


def test_every_default_is_accepted_as_help_prints_it() -> None:
    shown = [f"{setting.key}={setting.typed}" for setting in all_settings() if setting.default is not None]
    assert len(shown) > 50
    assert config.load(None, shown) == Run()


@pytest.mark.parametrize("text", ["2026-11-21", "007", "on", "1e5", "a #1", "a: b", "*", "~/pictures", "[0]"])
def test_text_is_taken_as_it_is_typed(text: str) -> None:
    assert config.load(None, [f"data.path={text}"]).data.path == text
    assert config.load(None, [f"data.path='{text}'"]).data.path == text


def test_a_date_in_a_recipe_is_text(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, "name: 2026-11-21\n")).name == "2026-11-21"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs=many", "train.epochs='many' is not possible: it should be a whole number"),
        ("train.epochs=0", "train.epochs=0 is not possible: it should be 1 or more"),
        ("train.epochs=1.5", "train.epochs=1.5 is not possible: it should be a whole number"),
        ("train.device=gpu", "it should be 'auto', 'cpu' or 'cuda'; did you mean cuda?"),
        ("train.device=cuda:1", "did you mean cuda, and CUDA_VISIBLE_DEVICES=1 to choose the GPU?"),
        ("train.precision=bfloat16", "'fp32'; did you mean bf16?"),
        ("train.precision=float32", "did you mean fp32?"),
        ("train.precision=bf61", "did you mean bf16?"),
        ("loss.recipe=dinov4", "did you mean dinov3?"),
        ("backbone.lgp=perhaps", "it should be true or false"),
        ("optim=3", "optim=3 is not possible: it should be a section with settings in it"),
        (
            "backbone.levels=x",
            "backbone.levels='x' is not possible: it should be a whole number, or it should be 'auto'",
        ),
        ("optim.lr.peak=1", "optim.lr.peak is unknown (did you mean optim.lr?)"),
        ("a.b.c.d=1", "a.b.c.d is unknown"),
        ("name=" + "n" * 300, "name is 300 bytes long"),
        ("name=" + "ü" * 101, "name is 202 bytes long"),
        ("data.path=/" + "n" * 300, "data.path has a part of more than 255 bytes"),
    ],
)
def test_a_mistake_is_told_once_in_plain_words(setting: str, expected: str) -> None:
    message = mistakes(setting)
    assert message.startswith("A mistake in the settings: ") and expected in message and "?." not in message


def test_a_long_list_of_mistakes_and_a_long_value_are_cut() -> None:
    message = mistakes(*(f"x{i}=1" for i in range(200)))
    assert message.startswith("200 mistakes") and "and 180 more" in message and len(message) < 5000
    assert len(mistakes("train.epochs=" + "9" * 100_000)) < 500
    assert len(mistakes("y" * 100_000 + "=1")) < 500


def test_validate_leaves_what_it_is_given_as_it_was() -> None:
    tree = {"train": {"epochs": "x"}}
    with pytest.raises(UserError):
        config.validate(tree)
    assert tree == {"train": {"epochs": "x"}}


# Derived values


def derived(images: int, *overrides: str) -> Run:
    return resolve(config.load(None, overrides), images)[0]


@pytest.mark.parametrize(
    ("images", "prototypes", "batch_norm", "teacher_temp"),
    [(2_000, 128, True, 0.04), (50_000, 4096, True, 0.04), (1_281_167, 65_536, False, 0.07)],
)
def test_size_aware_defaults(images: int, prototypes: int, batch_norm: bool, teacher_temp: float) -> None:
    run = derived(images)
    assert (run.head.prototypes, run.head.batch_norm, run.loss.teacher_temp) == (prototypes, batch_norm, teacher_temp)


def test_imagenet_for_a_hundred_epochs_is_dino_as_published() -> None:
    run = derived(1_281_167, "train.batch_size=1024")
    assert (
        run.optim.lr == pytest.approx(5e-4 * 4)
        and run.optim.warmup_epochs == 10
        and run.optim.teacher_momentum == 0.996
        and run.optim.teacher_momentum_end == 1
    )
    assert run.loss.warmup_teacher_temp == 0.04 and run.loss.warmup_teacher_temp_epochs == 30
    assert run.optim.freeze_last_layer_epochs == 1


def test_a_short_run_has_shorter_warm_ups_and_a_faster_teacher() -> None:
    run = derived(2_000, "train.epochs=10")  # 31 steps an epoch
    assert (
        run.optim.warmup_epochs == 1
        and run.loss.warmup_teacher_temp_epochs == 3
        and run.optim.freeze_last_layer_epochs == 0.5
    )
    assert run.optim.teacher_momentum == 0.98
    assert derived(2_000, "train.epochs=100").optim.teacher_momentum == pytest.approx(1 - 20 / 3100, abs=1e-4)


def test_the_teacher_of_a_short_run_follows_to_the_end() -> None:
    """It forgets what is older than a twentieth of the run; DINO's rise to 1 stops it for a quarter of 5,000 steps."""
    for images, epochs, end in ((2_000, 10, 0.98), (40_000, 8, 0.996), (40_000, 20, round(1 - 20 / 12_500, 5))):
        assert derived(images, f"train.epochs={epochs}").optim.teacher_momentum_end == end
    assert derived(40_000, "train.epochs=8", "optim.teacher_momentum=0.999").optim.teacher_momentum_end == 0.999
    assert derived(40_000, "train.epochs=80").optim.teacher_momentum_end == 1


def test_a_run_from_before_there_was_an_end_of_the_momentum_goes_on_as_it_was() -> None:
    asked = config.load(None, ["train.epochs=10"])
    for schedule, end in (("cosine", 1.0), ("constant", 0.98)):
        run = config.validate(asked.model_dump() | {"optim": {"schedule": schedule}})
        saved = resolve(run, 2_000)[0].model_dump()
        del saved["optim"]["teacher_momentum_end"]
        continued, _ = resolve(run, 2_000, saved=config.validate(saved))
        assert continued.optim.teacher_momentum_end == end, schedule


def test_nothing_is_left_open_and_every_derived_value_is_told_with_its_reason() -> None:
    before = config.load(None)
    run, derived = resolve(before, 50_000)
    open_before = {s.key for s in all_settings() if s.default is None}
    open_after = {s.key for s in all_settings() if defaults.value_of(run, s.key) is None}
    assert open_after == NEVER_DERIVED
    assert {d.key for d in derived} == open_before - open_after
    assert all(d.reason and defaults.value_of(run, d.key) == d.value for d in derived)
    assert resolve(run, 50_000) == (run, [])


def test_explicit_values_win() -> None:
    given = [
        "head.prototypes=65536",
        "head.batch_norm=false",
        "loss.teacher_temp=0.06",
        "loss.warmup_teacher_temp_epochs=0",
        "optim.lr=0.1",
        "optim.warmup_epochs=0",
        "optim.weight_decay_end=0.3",
        "optim.teacher_momentum=0.5",
        "optim.teacher_momentum_end=0.9",
        "optim.freeze_last_layer_epochs=0",
        "data.workers=0",
        "train.threads=1",
        "train.world_size=2",
        "eval.size=64",
        "eval.resize=64",
        "eval.knn_every_epochs=0",
    ]
    run, derived = resolve(config.load(None, given), 2_000)
    assert derived == []
    assert run.model_dump() == config.load(None, given).model_dump()


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (96, 110), (32, 37)])
def test_scores_see_the_published_share_of_an_image(size: int, resize: int) -> None:
    assert derived(2_000, f"eval.size={size}").eval.resize == resize
    crops = derived(2_000, f"views.global_crops_size={size}", "views.local_crops_size=16")
    assert (crops.eval.size, crops.eval.resize) == (size, resize)
    assert derived(2_000, f"eval.size={size}", "eval.resize=500").eval.resize == 500


def test_tiny_data_still_resolves() -> None:
    assert derived(1).head.prototypes == 128


# One run, written down and continued


def test_yaml_round_trip(tmp_path: Path) -> None:
    run, _ = resolve(config.load(None, ["name=x", "views.blur_prob=[0.1, 0.2, 0.3]", "optim.lr=3e-5"]), 2_000)
    text = config.to_yaml(run)
    assert config.load(write(tmp_path, text, "config.yaml")).model_dump() == run.model_dump()
    assert yaml.safe_load(text)["optim"]["lr"] == 3e-5


def test_inherit_keeps_what_was_derived_and_lets_what_is_written_win() -> None:
    saved, _ = resolve(config.load(None, ["train.threads=3"]), 2_000)
    again = defaults.inherit(config.load(None, ["train.log_every_steps=3"]), saved)
    assert (
        again.train.threads == 3 and again.head.prototypes == saved.head.prototypes and again.train.log_every_steps == 3
    )
    assert defaults.differences(saved, again) == []
    other = defaults.inherit(config.load(None, ["head.prototypes=512"]), saved)
    assert defaults.differences(saved, other) == ["head.prototypes: 128 -> 512"]


def test_differences_name_every_setting_that_changes_weights_and_no_free_one() -> None:
    saved, _ = resolve(config.load(None), 2_000)
    free = {s.key for s in all_settings() if s.free}
    assert free == {
        "folder",
        "track",
        "data.path",
        "data.val",
        "data.max_bad_fraction",
        "data.workers",
        "distill.teacher",
        "distill.teacher_weights",
        "train.log_every_steps",
        "train.save_every_minutes",
        "train.save_every_steps",
        "train.keep_last",
        "train.keep_every",
        "train.keep_best",
        "train.start_from",
        "train.rank_timeout",
        "train.world_size",
        "train.shard",
        "train.compile",
        "train.checkpoint_activations",
        "train.save_in_background",
        "eval.size",
        "eval.resize",
        "eval.knn_every_epochs",
        "eval.knn_max_images",
    }
    changed = [
        "folder=elsewhere",
        "data.path=moved",
        "data.val=moved",
        "eval.size=32",
        "eval.resize=48",
        "data.workers=7",
        "data.max_bad_fraction=0.5",
        "train.log_every_steps=1",
        "train.save_every_minutes=1",
        "train.save_every_steps=1",
        "train.keep_last=9",
        "train.rank_timeout=0",
        "train.world_size=4",
        "train.shard=true",
        "train.compile=true",
        "train.checkpoint_activations=true",
        "train.save_in_background=false",
        "eval.knn_every_epochs=3",
        "eval.knn_max_images=10",
    ]
    assert defaults.differences(saved, defaults.inherit(config.load(None, changed), saved)) == []
    changed = ["train.seed=1", "train.threads=64", "views.hflip_prob=0", "backbone.name=vit_tiny_patch16"]
    named = defaults.differences(saved, defaults.inherit(config.load(None, changed), saved))
    assert {line.partition(":")[0] for line in named} == {item.partition("=")[0] for item in changed}


def test_every_setting_has_a_meaning_and_a_readable_type() -> None:
    found = list(all_settings())
    assert len({s.key for s in found}) == len(found) > 60
    for setting in found:
        assert setting.description and setting.type
        assert "None" not in setting.type


@pytest.mark.parametrize(
    ("batch", "cores", "ranks"), [(64, 1, 1), (64, 2, 2), (64, 3, 2), (64, 64, 4), (30, 8, 1), (96, 4, 4), (8, 4, 1)]
)
def test_a_cpu_run_takes_a_process_a_core_with_equal_slices_of_16_images_or_more(
    batch: int, cores: int, ranks: int
) -> None:
    assert local_ranks(batch, cores) == ranks


def gpu_run(*settings: str) -> Run:
    return config.load(None, ["data.path=x", *settings])


@pytest.mark.parametrize(
    ("settings", "gpus", "ranks", "why"),
    [
        ([], 1, 1, "the GPU of this machine"),
        ([], 8, 8, "one for each of 8 GPUs"),
        (["train.batch_size=60"], 8, 6, "60 images on 6 of 8 GPUs, 2 left unused; train.batch_size=56 or 64 would"),
        (["train.batch_size=61"], 2, 1, "1 of 2 GPUs, 1 left unused; train.batch_size=60 or 62 would use all"),
        (["train.batch_size=64", "train.accumulate_steps=4"], 8, 8, "one for each of 8 GPUs"),
        (["train.batch_size=64", "train.accumulate_steps=8"], 8, 4, "4 of 8 GPUs, 4 left unused"),
        (["train.batch_size=4"], 8, 2, "2 of 8 GPUs, 6 left unused; train.batch_size=16 would use all"),
        (["train.world_size=2"], 8, 2, "as set"),
    ],
)
def test_a_run_takes_every_gpu_that_gets_an_equal_slice(settings: list[str], gpus: int, ranks: int, why: str) -> None:
    found = defaults.world_size(gpu_run(*settings), None, 2, gpus)
    assert found.value == ranks and why in found.reason
    defaults.on_ranks(gpu_run(*settings), ranks)  # which would refuse what does not divide


def test_a_run_on_gpus_goes_on_as_it_was_begun_where_there_are_enough() -> None:
    begun = gpu_run("train.world_size=4")
    assert defaults.world_size(gpu_run(), begun, 2, 4)[1:] == (4, "as the run was begun")
    assert defaults.world_size(gpu_run(), begun, 2, 8)[1:] == (4, "as the run was begun, 4 left unused")
    fewer = defaults.world_size(gpu_run(), begun, 2, 2)
    assert fewer.value == 2 and "begun by 4 processes, for which there are not enough GPUs here" in fewer.reason
    assert defaults.world_size(gpu_run(), begun, 1, 0).value == 4  # on CPUs as ever


def test_more_processes_than_gpus_are_a_mistake() -> None:
    with pytest.raises(UserError, match=r"train.world_size=4, but 2 GPUs are visible here.*CUDA_VISIBLE_DEVICES"):
        defaults.world_size(gpu_run("train.world_size=4"), None, 16, 2)
    with pytest.raises(UserError, match=r"train.world_size=2, but one GPU is visible here"):
        defaults.world_size(gpu_run("train.world_size=2"), None, 16, 1)


def test_a_batch_that_does_not_divide_among_the_ranks_is_a_mistake() -> None:
    assert "is not divisible by train.world_size=3" in mistakes("train.batch_size=64", "train.world_size=3")
