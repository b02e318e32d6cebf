"""What a run is: typed settings from a recipe and `key.sub=value`, with defaults that know the data's size.

A setting whose default is `None` is derived by `defaults.resolve` from the number of images and the length of the
run, with the reason beside it; whatever the user writes wins. All mistakes of a recipe are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from nearfar.ssl.errors import UserError
from nearfar.ssl.setting_errors import impossible, unknown

# Settings marked so may differ when a run is continued: they do not change a single weight.
FREE: dict[str, JsonValue] = {"resume": "free"}

Share = tuple[float, float]


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


class Data(Settings):
    path: str = Field(
        "",
        description="training images: class folders, a flat folder, a .txt list, an .npz, a .beton or .tar shards",
        json_schema_extra=FREE,  # what is in it may not change: checkpoints hold its fingerprint
    )
    val: str | None = Field(
        None, description="labeled images for the online k-NN and the evaluators", json_schema_extra=FREE
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="data processes (ffcv: threads) of each rank, which decode and crop; default: cores - 1, at most 8",
        json_schema_extra=FREE,
    )
    loader: Literal["auto", "ffcv", "folder", "device"] = Field(
        "auto",
        description="what makes views: Pillow (folder), compiled loops over a .beton (ffcv; auto takes it for one), or "
        "the training device, where all images lie in its memory (device)",
    )
    color_on: Literal["device", "loader"] = Field(
        "device", description="where views are colored: on the training device, or by the ffcv loader, to 8 bits"
    )
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="stop when more than this share of the files is unreadable",
        json_schema_extra=FREE,
    )
    min_side: int = Field(8, ge=1, description="an image with a shorter side is reported as bad, in pixels")


class Views(Settings):
    global_crops_size: int = Field(224, ge=4, description="side of the 2 global views, in pixels")
    global_crops_scale: Share = Field((0.4, 1.0), description="share of the image's area that a global view covers")
    local_crops_size: int = Field(96, ge=4, description="side of a local view, in pixels")
    local_crops_scale: Share = Field((0.05, 0.4), description="share of the image's area that a local view covers")
    local_crops_number: int = Field(8, ge=0, description="local views of an image")
    ratio: Share = Field((3 / 4, 4 / 3), description="aspect ratios of a crop, width / height")
    hflip_prob: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter_prob: float = Field(0.8, ge=0, le=1, description="probability of color jitter")
    brightness: float = Field(0.4, ge=0, le=1, description="jitter: brightness factor within 1 +- this")
    contrast: float = Field(0.4, ge=0, le=1, description="jitter: contrast factor within 1 +- this")
    saturation: float = Field(0.2, ge=0, le=1, description="jitter: saturation factor within 1 +- this")
    hue: float = Field(0.1, ge=0, le=0.5, description="jitter: hue shift within +- this, in turns")
    grayscale_prob: float = Field(0.2, ge=0, le=1, description="probability of a gray view")
    blur_prob: tuple[float, float, float] = Field(
        (1.0, 0.1, 0.5), description="probability of blur: first global, second global, local views"
    )
    blur_sigma: Share = Field((0.1, 2.0), description="standard deviation of the blur, in pixels of the view")
    solarize_prob: tuple[float, float, float] = Field(
        (0.0, 0.2, 0.0), description="probability of solarizing: first global, second global, local views"
    )
    solarize_threshold: int = Field(128, ge=0, le=256, description="gray level from which solarizing inverts")


class Backbone(Settings):
    name: str = Field("vit_small_patch16", description="{vit,vim}_{tiny,small,base}_patch16 or timm/NAME")
    lgp: bool = Field(False, description="local + wavelet-packet patches, no position embedding")
    wavelet: str = Field("haar", description="LGP's wavelet; haar stays within a patch, db2, db4, sym4 ... do not")
    levels: int | Literal["auto"] = Field("auto", description="depth of LGP's wavelet packet; auto: log2(patch size)")
    gaug: bool = Field(False, description="Gaussian-augmented attention")
    prr: bool = Field(False, description="parameter-free patch refinement after the last norm")
    registers: int = Field(0, ge=0, description="register tokens")
    rope: bool = Field(False, description="axial rotary positions in place of learned ones")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the student")
    patch_size: int | None = Field(None, ge=1, description="overrides the name's patch size, in pixels")
    embed_dim: int | None = Field(None, ge=1, description="overrides the name's width")
    depth: int | None = Field(None, ge=1, description="overrides the name's number of blocks")
    num_heads: int | None = Field(None, ge=1, description="overrides the name's number of heads")
    pos_size: int | None = Field(
        None, ge=1, description="image size the learned positions are for, in pixels; 224 for DINO's public weights"
    )
    pretrained: bool = Field(False, description="start from timm's published weights (timm/NAME only)")
    scan: Literal["auto", "torch", "triton", "mamba"] = Field(
        "auto", description="what runs Vision Mamba's recurrence; auto: triton on CUDA, torch elsewhere"
    )
    weights: str | None = Field(None, description="file of weights to start from: DINO's .pth, timm's or our own")


class Head(Settings):
    prototypes: int | None = Field(None, ge=2, description="outputs K; default follows the number of images")
    hidden_dim: int = Field(2048, ge=1, description="width of the two hidden layers")
    bottleneck_dim: int = Field(256, ge=1, description="width of the normalized layer before the prototypes")
    batch_norm: bool | None = Field(
        None, description="batch norm in the hidden layers; default: on below 100,000 images"
    )
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="what the head reads, and the scores too: CLS, or the mean over the patches"
    )


class Loss(Settings):
    student_temp: float = Field(0.1, gt=0, description="temperature of the student's softmax")
    teacher_temp: float | None = Field(None, gt=0, description="temperature of the teacher's softmax after warm-up")
    warmup_teacher_temp: float = Field(0.04, gt=0, description="temperature at the start of the warm-up")
    warmup_teacher_temp_epochs: float | None = Field(None, ge=0, description="epochs of temperature warm-up")
    centering: Literal["centering", "sinkhorn_knopp"] = Field(
        "centering",
        description="what keeps the teacher from one answer: a running center (DINO), Sinkhorn-Knopp (DINOv2)",
    )
    center_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the teacher's center")
    koleo_weight: float = Field(0.0, ge=0, description="weight of KoLeo on the global views' features; 0.1 in DINOv2")


class Optim(Settings):
    lr: float | None = Field(None, gt=0, description="peak learning rate; default 5e-4 x batch / 256")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    warmup_epochs: float | None = Field(None, ge=0, description="epochs of linear learning-rate warm-up")
    weight_decay: float = Field(0.04, ge=0, description="weight decay at the start (none on biases and 1-D tensors)")
    weight_decay_end: float = Field(0.4, ge=0, description="weight decay at the end, cosine between")
    clip_grad: float = Field(3.0, ge=0, description="gradient-norm limit of each tensor, as in DINO; 0 = off")
    teacher_momentum: float | None = Field(
        None, ge=0, le=1, description="teacher's momentum at the start; cosine to 1 at the end"
    )
    freeze_last_layer_epochs: float | None = Field(
        None, ge=0, description="epochs in which the prototypes stay as they are"
    )


class Train(Settings):
    epochs: int = Field(100, ge=1, description="passes over the training images")
    batch_size: int = Field(64, ge=2, description="images a step, over all ranks")
    world_size: int | None = Field(
        None,
        ge=1,
        description="processes that share each batch; torchrun and SLURM set it; default: by cores (CPU), 1 (GPU)",
        json_schema_extra=FREE,  # sums in another order: the same run up to rounding, and said so when it is continued
    )
    seed: int = Field(0, ge=0, description="seed of weights, order, views and drop-path")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="autocast; auto takes bf16 where the hardware multiplies it"
    )
    threads: int | None = Field(
        None, ge=1, description="torch's threads on a CPU; part of a run, since sums depend on it"
    )
    log_every_steps: int = Field(10, ge=1, description="steps between two lines of metrics", json_schema_extra=FREE)
    save_every_minutes: float = Field(5.0, gt=0, description="minutes between two checkpoints", json_schema_extra=FREE)
    save_every_steps: int | None = Field(
        None, ge=1, description="steps between two checkpoints, besides save_every_minutes", json_schema_extra=FREE
    )
    keep_last: int = Field(2, ge=1, description="checkpoints kept", json_schema_extra=FREE)


class Eval(Settings):
    size: int | None = Field(
        None, ge=4, description="side of an evaluated image, in pixels; default: global", json_schema_extra=FREE
    )
    resize: int | None = Field(
        None, ge=4, description="shorter side before the center crop; default: size", json_schema_extra=FREE
    )
    knn_every_epochs: float | None = Field(
        None,
        ge=0,
        description="epochs, or parts of one, between two online k-NN scores; 0 = off",
        json_schema_extra=FREE,
    )
    knn_max_images: int = Field(
        5000,
        ge=1,
        description="most training images in the online k-NN's memory, and validation images it scores",
        json_schema_extra=FREE,
    )


class Run(Settings):
    """One pretraining run, whole. `config.yaml` in its folder holds it with every derived value filled in."""

    name: str = Field("", description="name of the run's folder; default: the recipe's name")
    folder: str = Field("runs", description="where run folders are", json_schema_extra=FREE)
    data: Data = Data()
    views: Views = Views()
    backbone: Backbone = Backbone()
    head: Head = Head()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name


class Setting(NamedTuple):
    """A leaf of `Run`, as `--help` and the comparison of two runs see it."""

    key: str
    type: str
    default: Any
    description: str
    free: bool


def settings() -> Iterator[Setting]:
    """Every setting with its dotted key, in the order of the recipe."""
    for section, field in Run.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            leaves = [(f"{section}.{name}", leaf) for name, leaf in field.annotation.model_fields.items()]
        else:
            leaves = [(section, field)]
        for key, leaf in leaves:
            kind = str(leaf.annotation.__name__ if isinstance(leaf.annotation, type) else leaf.annotation)
            kind = kind.replace("typing.", "").replace(" | None", "")
            yield Setting(key, kind, leaf.default, leaf.description or "", bool(leaf.json_schema_extra == FREE))


KEYS = [setting.key for setting in settings()]


def load(recipe: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """Read a YAML recipe, lay `key.sub=value` over it, validate.

    Raises:
        UserError: one paragraph with every unknown key (and the nearest right one), every bad value and every
            impossible combination.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    if recipe is not None:
        tree = _read_yaml(recipe)
        tree.setdefault("name", recipe.stem)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign:
            problems.append(f"'{item}' is not a setting: write key=value, for example train.epochs=20")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        *sections, leaf = key.strip().split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else node
        if isinstance(node, dict):
            node[leaf] = value
        else:
            problems.append(unknown(key, KEYS))
    return validate(tree, problems)


def validate(tree: dict[str, Any], problems: list[str] | None = None) -> Run:
    """A `Run` from nested dicts, or one `UserError` with all that is wrong."""
    tree, problems = _string_keys(tree), list(problems or [])
    try:
        run = Run.model_validate(tree)
    except ValidationError as error:
        for mistake in error.errors():
            place = [part for part in mistake["loc"] if isinstance(part, str)]
            key = ".".join(place)
            if mistake["type"] == "extra_forbidden":
                problems.append(unknown(key, KEYS))
            else:
                problems.append(impossible(key, mistake["input"], mistake["msg"]))
            _drop(tree, place)
        run = Run.model_validate(tree)  # what was right is right: the combinations are checked as well
    problems += combinations(run)
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "A mistake"
        raise UserError(f"{count} in the settings: " + "; ".join(problems) + ".")
    return run


def combinations(run: Run) -> list[str]:
    """What is wrong between settings that are each fine alone, in words."""
    views, backbone, found = run.views, run.backbone, []
    for name in ("global_crops_scale", "local_crops_scale", "ratio", "blur_sigma"):
        low, high = getattr(views, name)
        if not 0 < low <= high:
            found.append(f"views.{name} must rise from above 0, and is [{low:g}, {high:g}]")
    for name in ("global_crops_scale", "local_crops_scale"):
        if getattr(views, name)[1] > 1:
            found.append(f"views.{name} is a share of the image's area and cannot pass 1")
    for name in ("blur_prob", "solarize_prob"):
        if not all(0 <= p <= 1 for p in getattr(views, name)):
            found.append(f"views.{name} holds probabilities between 0 and 1")
    patch = backbone.patch_size or _patch_in(backbone.name)
    if patch:
        for name in ("global_crops_size", "local_crops_size") if views.local_crops_number else ("global_crops_size",):
            size = getattr(views, name)
            if size % patch:
                near = max(patch, round(size / patch) * patch)
                found.append(f"views.{name}={size} is no multiple of the patch size {patch} (nearest: {near})")
    if views.local_crops_number and views.local_crops_size > views.global_crops_size:
        found.append(
            f"local views ({views.local_crops_size} px) are larger than global ones ({views.global_crops_size} px)"
        )
    if backbone.embed_dim and backbone.num_heads and backbone.embed_dim % backbone.num_heads:
        found.append(f"backbone.embed_dim={backbone.embed_dim} does not divide into {backbone.num_heads} heads")
    if (backbone.levels, backbone.wavelet) != ("auto", "haar") and not (backbone.lgp or "_lgp" in backbone.name):
        found.append("backbone.levels and backbone.wavelet are LGP's, and backbone.lgp is off")
    if backbone.pretrained and backbone.weights:
        found.append("backbone.pretrained and backbone.weights are two starts; leave one out")
    if backbone.pretrained and not backbone.name.startswith("timm/"):
        found.append(f"backbone.pretrained needs a timm/NAME backbone, not {backbone.name}")
    if run.train.batch_size % (run.train.world_size or 1):
        found.append(
            f"train.batch_size={run.train.batch_size} does not divide into train.world_size={run.train.world_size}"
        )
    is_vim = backbone.name.startswith("vim_")
    if is_vim and (backbone.gaug or backbone.registers):
        found.append(f"{backbone.name} has no attention, so backbone.gaug and backbone.registers cannot be set")
    if not is_vim and backbone.scan != "auto":
        found.append(f"backbone.scan={backbone.scan} is for Vision Mamba (vim_...), not {backbone.name}")
    for key, epochs in (
        ("optim.warmup_epochs", run.optim.warmup_epochs),
        ("loss.warmup_teacher_temp_epochs", run.loss.warmup_teacher_temp_epochs),
        ("optim.freeze_last_layer_epochs", run.optim.freeze_last_layer_epochs),
    ):
        if epochs is not None and epochs > run.train.epochs:
            found.append(f"{key}={epochs:g} is longer than the run (train.epochs={run.train.epochs})")
    size = run.eval.size or views.global_crops_size
    if run.eval.resize and run.eval.resize < size:
        found.append(f"eval.resize={run.eval.resize} is smaller than the crop eval.size={size}")
    if "/" in run.name or run.name in (".", ".."):
        found.append(f"name={run.name!r} must be a plain folder name (its place is set by folder=)")
    return found


def to_yaml(run: Run) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def _patch_in(name: str) -> int | None:
    """The patch size that one of our names states; timm's models say theirs when they are built."""
    if name.startswith("timm/"):
        return None
    tail = name.partition("_patch")[2].partition("_")[0]
    return int(tail) if tail.isdigit() else None


def _read_yaml(recipe: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(recipe.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no recipe {recipe}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The recipe {recipe} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {recipe} is not valid YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"The recipe {recipe} must hold sections such as 'data:' and 'train:', not {tree!r}.")
    return {
        key: value for key, value in tree.items() if value is not None
    }  # a section with all its lines commented out


def _string_keys(node: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def _drop(tree: dict[str, Any], place: list[str]) -> None:
    for section in place[:-1]:
        tree = tree[section] if isinstance(tree.get(section), dict) else {}
    tree.pop(place[-1], None)
