"""What a run is: typed settings from a recipe and `key.sub=value`, with defaults that know the data's size.

A setting whose default is `None` is derived by `defaults.resolve` from the number of images and the length of the
run, with the reason beside it; whatever the user writes wins. All mistakes of a recipe are reported together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from nearfar.ssl import bounded_yaml
from nearfar.ssl.errors import UserError
from nearfar.ssl.setting_errors import in_words, unknown

# Settings marked so may differ when a run is continued: they do not change a single weight.
FREE: dict[str, JsonValue] = {"resume": "free"}


def _numbers(value: Any) -> Any:
    """Numbers separated by commas, in whatever brackets: 0.4,1.0 and (0.4, 1.0) are [0.4, 1.0]."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.strip().removeprefix("(").removesuffix(")").strip("[] ").split(",")]


Share = Annotated[tuple[float, float], BeforeValidator(_numbers)]  # a range: lowest, highest
ViewProbs = Annotated[tuple[float, float, float], BeforeValidator(_numbers)]  # first global, second global, local views


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
        None,
        description="labeled images, for the k-NN score during training and for `nearfar eval`",
        json_schema_extra=FREE,
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes of each rank (ffcv: threads) that decode and crop images; default: cores - 1, at most 8",
        json_schema_extra=FREE,
    )
    loader: Literal["auto", "ffcv", "folder", "device"] = Field(
        "auto",
        description="what makes the views: folder = Pillow; ffcv = compiled loops over a .beton file; device = the "
        "training device, with all images in its memory; auto = ffcv for a .beton, else folder",
    )
    color_on: Literal["device", "loader"] = Field(
        "device",
        description="where colors are changed: on the training device, or in the ffcv loader (rounded to 8 bits)",
    )
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="the run stops when more than this share of the images cannot be read",
        json_schema_extra=FREE,
    )
    min_side: int = Field(
        8, ge=1, description="an image with a shorter side than this, in pixels, counts as unreadable"
    )


class Views(Settings):
    global_crops_size: int = Field(224, ge=4, description="side of the two global views, in pixels")
    global_crops_scale: Share = Field(
        (0.4, 1.0), description="smallest and largest share of the image's area that a global view covers"
    )
    local_crops_size: int = Field(96, ge=4, description="side of a local view, in pixels")
    local_crops_scale: Share = Field(
        (0.05, 0.4), description="smallest and largest share of the image's area that a local view covers"
    )
    local_crops_number: int = Field(8, ge=0, description="number of local views of each image")
    ratio: Share = Field((3 / 4, 4 / 3), description="smallest and largest aspect ratio of a crop, width / height")
    hflip_prob: float = Field(0.5, ge=0, le=1, description="probability that a view is flipped left to right")
    color_jitter_prob: float = Field(
        0.8, ge=0, le=1, description="probability that brightness, contrast, saturation and hue are changed"
    )
    brightness: float = Field(
        0.4, ge=0, le=1, description="color jitter: the brightness factor lies within 1 plus or minus this"
    )
    contrast: float = Field(
        0.4, ge=0, le=1, description="color jitter: the contrast factor lies within 1 plus or minus this"
    )
    saturation: float = Field(
        0.2, ge=0, le=1, description="color jitter: the saturation factor lies within 1 plus or minus this"
    )
    hue: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="color jitter: the hue is shifted by at most this share of the color circle, either way",
    )
    grayscale_prob: float = Field(0.2, ge=0, le=1, description="probability that a view loses its colors")
    blur_prob: ViewProbs = Field(
        (1.0, 0.1, 0.5), description="probability of blur, for the first global, the second global and the local views"
    )
    blur_sigma: Share = Field(
        (0.1, 2.0), description="smallest and largest standard deviation of the blur, in pixels of the view"
    )
    solarize_prob: ViewProbs = Field(
        (0.0, 0.2, 0.0),
        description="probability of solarizing, for the first global, the second global and the local views",
    )
    solarize_threshold: int = Field(
        128, ge=0, le=256, description="solarizing inverts every color value from this one up (0 to 255)"
    )


class Backbone(Settings):
    name: str = Field(
        "vit_small_patch16",
        description="vit_ or vim_, tiny, small or base, and _patch16 (or another size); timm/NAME for timm's models",
    )
    lgp: bool = Field(
        False, description="LGP: patches embedded by a local and a wavelet-packet branch, without position embedding"
    )
    wavelet: str = Field(
        "haar",
        description="LGP's wavelet: haar stays within each patch; db2, db4, sym4 and so on reach into the next one",
    )
    levels: int | Literal["auto"] = Field("auto", description="depth of LGP's wavelet packet; auto = log2(patch size)")
    gaug: bool = Field(False, description="GAug: a Gaussian around each patch is added to the attention logits")
    prr: bool = Field(False, description="PRR: parameter-free refinement of the patch tokens after the last norm")
    registers: int = Field(0, ge=0, description="number of register tokens")
    rope: bool = Field(False, description="axial rotary positions in place of learned ones")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth: highest probability that a block of the student is skipped"
    )
    patch_size: int | None = Field(None, ge=1, description="patch size in pixels, in place of the one in the name")
    embed_dim: int | None = Field(
        None, ge=1, description="width of the tokens, in place of the one that the name stands for"
    )
    depth: int | None = Field(None, ge=1, description="number of blocks, in place of the one that the name stands for")
    num_heads: int | None = Field(
        None, ge=1, description="number of attention heads, in place of the one that the name stands for"
    )
    pos_size: int | None = Field(
        None, ge=1, description="image size the learned positions are for, in pixels; 224 for DINO's public weights"
    )
    pretrained: bool = Field(
        False,
        description="start from the weights that timm publishes (timm/NAME only; needs the internet, or its cache)",
    )
    scan: Literal["auto", "torch", "triton", "mamba"] = Field(
        "auto", description="what computes Vision Mamba's recurrence; auto = triton on a GPU, torch elsewhere"
    )
    weights: str | None = Field(
        None,
        description="weights to start from: a run's folder, a checkpoint, an exported file, or a .pth of DINO or timm",
    )


class Head(Settings):
    prototypes: int | None = Field(
        None, ge=2, description="number of prototypes K, the outputs of the head; default: by the number of images"
    )
    hidden_dim: int = Field(2048, ge=1, description="width of the two hidden layers")
    bottleneck_dim: int = Field(256, ge=1, description="width of the normalized layer before the prototypes")
    batch_norm: bool | None = Field(
        None, description="batch norm in the hidden layers; default: true below 100,000 images"
    )
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="what the head and the scores read: the CLS token, or the mean over the patches"
    )


class Loss(Settings):
    student_temp: float = Field(0.1, gt=0, description="temperature of the student's softmax")
    teacher_temp: float | None = Field(None, gt=0, description="temperature of the teacher's softmax after warm-up")
    warmup_teacher_temp: float = Field(
        0.04, gt=0, description="temperature of the teacher's softmax at the start of the warm-up"
    )
    warmup_teacher_temp_epochs: float | None = Field(
        None, ge=0, description="epochs in which the teacher's temperature warms up"
    )
    centering: Literal["centering", "sinkhorn_knopp"] = Field(
        "centering",
        description="what keeps the teacher from collapsing: a running center (DINO) or Sinkhorn-Knopp (DINOv2)",
    )
    center_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the running center")
    koleo_weight: float = Field(
        0.0, ge=0, description="weight of the KoLeo loss on the features of the global views; 0.1 in DINOv2, 0 = off"
    )


class Optim(Settings):
    lr: float | None = Field(None, gt=0, description="highest learning rate; default: 5e-4 x batch size / 256")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the run")
    warmup_epochs: float | None = Field(
        None, ge=0, description="epochs in which the learning rate rises to its highest"
    )
    weight_decay: float = Field(
        0.04, ge=0, description="weight decay at the start of the run (biases and other 1-D tensors have none)"
    )
    weight_decay_end: float = Field(0.4, ge=0, description="weight decay at the end of the run, along a cosine")
    clip_grad: float = Field(3.0, ge=0, description="largest gradient norm of each tensor, as in DINO; 0 = no limit")
    teacher_momentum: float | None = Field(
        None, ge=0, le=1, description="momentum of the teacher at the start of the run; it rises to 1 along a cosine"
    )
    freeze_last_layer_epochs: float | None = Field(
        None, ge=0, description="epochs at the start in which the prototypes do not learn"
    )


class Train(Settings):
    epochs: int = Field(100, ge=1, description="passes over the training images")
    batch_size: int = Field(64, ge=2, description="images in each step, over all processes")
    accumulate_steps: int = Field(
        1,
        ge=1,
        description="parts that each process takes its share of a step in, for less memory: the gradient is that of "
        "the whole, but batch norm, Sinkhorn-Knopp and KoLeo see one part at a time",
    )
    world_size: int | None = Field(
        None,
        ge=1,
        description="processes that share each batch; default: by the cores on a CPU, 1 on a GPU, as started by SLURM",
        json_schema_extra=FREE,  # sums in another order: the same run up to rounding, and said so when it is continued
    )
    seed: int = Field(0, ge=0, description="seed of the weights, the order of the images, the views and drop-path")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="numbers used in the forward pass; auto = bf16 where the hardware multiplies it, else fp32"
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="threads of each process on a CPU; a part of the run, since the rounding of sums depends on it",
    )
    log_every_steps: int = Field(10, ge=1, description="steps between two lines of metrics", json_schema_extra=FREE)
    save_every_minutes: float = Field(5.0, gt=0, description="minutes between two checkpoints", json_schema_extra=FREE)
    save_every_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two checkpoints, besides those by save_every_minutes",
        json_schema_extra=FREE,
    )
    keep_last: int = Field(2, ge=1, description="number of checkpoints that are kept", json_schema_extra=FREE)


class Eval(Settings):
    size: int | None = Field(
        None,
        ge=4,
        description="side of an image for the scores, in pixels; default: that of the global views",
        json_schema_extra=FREE,
    )
    resize: int | None = Field(
        None,
        ge=4,
        description="shorter side to which an image is resized before its center is cut out; default: eval.size",
        json_schema_extra=FREE,
    )
    knn_every_epochs: float | None = Field(
        None,
        ge=0,
        description="epochs (1.5, say) between two k-NN scores during training; 0 = off",
        json_schema_extra=FREE,
    )
    knn_max_images: int = Field(
        5000,
        ge=1,
        description="most training images that the k-NN score during training looks at, and most images that it scores",
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
    type: str  # in words
    default: Any
    description: str
    free: bool
    is_text: bool  # what is typed for it is taken as it is, and not read as YAML

    @property
    def typed(self) -> str:
        """The default as it may be typed behind `key=`; `(derived)` or `(not set)` where there is none."""
        if self.default is None:
            return "(not set)" if self.key in NEVER_DERIVED else "(derived)"
        if isinstance(self.default, tuple):
            return ",".join(f"{x:g}" if float(f"{x:g}") == x else repr(x) for x in self.default)
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


# Settings without a default that stay so: nothing about the run says what they should be.
NEVER_DERIVED = frozenset(
    ["data.val", "train.save_every_steps"]
    + [f"backbone.{name}" for name in ("patch_size", "embed_dim", "depth", "num_heads", "weights")]
)


def settings() -> Iterator[Setting]:
    """Every setting with its dotted key, in the order of the recipe."""
    for section, field in Run.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            leaves = [(f"{section}.{name}", leaf) for name, leaf in field.annotation.model_fields.items()]
        else:
            leaves = [(section, field)]
        for key, leaf in leaves:
            free = bool(leaf.json_schema_extra == FREE)
            is_text = str in (leaf.annotation, *get_args(leaf.annotation))
            yield Setting(key, _in_words(leaf.annotation), leaf.default, leaf.description or "", free, is_text)


def _in_words(kind: Any) -> str:
    """What a setting takes, for people."""
    if get_origin(kind) is Literal:
        *first, last = map(str, get_args(kind))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers"
    if isinstance(kind, UnionType) or get_args(kind):
        return " or ".join(_in_words(one) for one in get_args(kind) if one is not NoneType)
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[kind]


KEYS = [setting.key for setting in settings()]
TEXTS = {setting.key: setting.default for setting in settings() if setting.is_text}


def load(recipe: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """Read a YAML recipe, lay `key.sub=value` over it, validate.

    Raises:
        UserError: one paragraph with every unknown key (and the nearest right one), every bad value and every
            impossible combination.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    if recipe is not None:
        read = bounded_yaml.read(recipe, "recipe")
        tree = {key: value for key, value in read.items() if value is not None}  # all of a section may be commented out
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign:
            problems.append(f"'{item[:200]}' is not a setting: write key=value, for example train.epochs=20")
            continue
        *sections, leaf = key.strip().split(".")
        node: Any = tree
        if len(sections) == 1:
            node = tree.setdefault(sections[0], {})
        if isinstance(node, dict) and len(sections) < 2:
            node[leaf] = _typed(key.strip(), text)
        else:
            problems.append(unknown(key, KEYS))
    if recipe is not None and not tree.get("name"):
        tree["name"] = recipe.stem
    return validate(tree, problems)


def _typed(key: str, text: str) -> Any:
    """The value of `key=text`: as YAML reads it, but text stays as it is unless quoted; none is the default."""
    if key in TEXTS:
        if not text.strip():
            return TEXTS[key]
        if text.strip() != "null" and text.strip()[0] not in ("'", '"'):
            return text
    try:
        return bounded_yaml.parse(text)
    except yaml.YAMLError:
        return text


def validate(tree: dict[str, Any], problems: list[str] | None = None) -> Run:
    """A `Run` from nested dicts, or one `UserError` with all that is wrong."""
    tree, problems = _string_keys(tree), list(problems or [])
    try:
        run = Run.model_validate(tree)
    except ValidationError as error:
        for mistake in in_words(error, KEYS):
            problems.append(mistake.told)
            _drop(tree, mistake.place)
        run = Run.model_validate(tree)  # what was right is right: the combinations are checked as well
    problems += combinations(run)
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "A mistake"
        more = [f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
        raise UserError(f"{count} in the settings: " + "; ".join(problems[:MOST_TOLD] + more) + ".")
    return run


MOST_TOLD = 20


def combinations(run: Run) -> list[str]:
    """What is wrong between settings that are each fine alone, in words."""
    found = [*_wrong_names(run), *_wrong_ranges(run.views), *_wrong_sizes(run), *_wrong_backbone(run.backbone)]
    if run.train.batch_size % (run.train.world_size or 1):
        found.append(
            f"train.batch_size={run.train.batch_size} does not divide into train.world_size={run.train.world_size}"
        )
    elif run.train.batch_size // (run.train.world_size or 1) % run.train.accumulate_steps:
        found.append(
            f"the {run.train.batch_size // (run.train.world_size or 1)} images of a step in each process do not divide "
            f"into train.accumulate_steps={run.train.accumulate_steps}"
        )
    for key, epochs in (
        ("optim.warmup_epochs", run.optim.warmup_epochs),
        ("loss.warmup_teacher_temp_epochs", run.loss.warmup_teacher_temp_epochs),
        ("optim.freeze_last_layer_epochs", run.optim.freeze_last_layer_epochs),
    ):
        if epochs is not None and epochs > run.train.epochs:
            found.append(f"{key}={epochs:g} is longer than the run (train.epochs={run.train.epochs})")
    return found


def _wrong_names(run: Run) -> Iterator[str]:
    """Names and paths that no file system takes."""
    if "/" in run.name or run.name in (".", "..") or not run.name.isprintable():
        yield f"name={run.name!r} must be a plain folder name (its place is set by folder=)"
    if (length := len(os.fsencode(run.name))) > LONGEST_NAME:
        yield f"name is {length} bytes long, and the name of a run's folder has at most {LONGEST_NAME}"
    paths = {"folder": run.folder, "data.path": run.data.path, "data.val": run.data.val}
    for key, path in (paths | {"backbone.weights": run.backbone.weights}).items():
        if path and "\0" in path:
            yield f"{key}={path!r} holds a zero character, which no path can"
        if path and max(len(os.fsencode(part)) for part in path.split("/")) > 255:
            yield f"{key} has a part of more than 255 bytes, which no file system takes"


LONGEST_NAME = 200  # file systems take 255 bytes; the rest is for what is put around it


def _wrong_ranges(views: Views) -> Iterator[str]:
    for name in ("global_crops_scale", "local_crops_scale", "ratio", "blur_sigma"):
        low, high = getattr(views, name)
        if not 0 < low <= high:
            yield f"views.{name} must rise from above 0, and is [{low:g}, {high:g}]"
    for name in ("global_crops_scale", "local_crops_scale"):
        if getattr(views, name)[1] > 1:
            yield f"views.{name} is a share of the image's area and cannot pass 1"
    for name in ("blur_prob", "solarize_prob"):
        if not all(0 <= p <= 1 for p in getattr(views, name)):
            yield f"views.{name} holds probabilities between 0 and 1"


def _wrong_sizes(run: Run) -> Iterator[str]:
    """Sides in pixels that do not fit each other or the patches."""
    views, patch = run.views, run.backbone.patch_size or _patch_in(run.backbone.name)
    if patch:
        for name in ("global_crops_size", "local_crops_size") if views.local_crops_number else ("global_crops_size",):
            size = getattr(views, name)
            if size % patch:
                near = max(patch, round(size / patch) * patch)
                yield f"views.{name}={size} is no multiple of the patch size {patch} (nearest: {near})"
    if views.local_crops_number and views.local_crops_size > views.global_crops_size:
        yield f"local views ({views.local_crops_size} px) are larger than global ones ({views.global_crops_size} px)"
    size = run.eval.size or views.global_crops_size
    if run.eval.resize and run.eval.resize < size:
        yield f"eval.resize={run.eval.resize} is smaller than the crop eval.size={size}"


def _wrong_backbone(backbone: Backbone) -> Iterator[str]:
    """Switches that a backbone cannot take, as far as its name says so."""
    if backbone.embed_dim and backbone.num_heads and backbone.embed_dim % backbone.num_heads:
        yield f"backbone.embed_dim={backbone.embed_dim} does not divide into {backbone.num_heads} heads"
    if (backbone.levels, backbone.wavelet) != ("auto", "haar") and not (backbone.lgp or "_lgp" in backbone.name):
        yield "backbone.levels and backbone.wavelet are LGP's, and backbone.lgp is off"
    if backbone.pretrained and backbone.weights:
        yield "backbone.pretrained and backbone.weights are two starts; leave one out"
    if backbone.pretrained and not backbone.name.startswith("timm/"):
        yield f"backbone.pretrained needs a timm/NAME backbone, not {backbone.name}"
    is_vim = backbone.name.startswith("vim_")
    if is_vim and (backbone.gaug or backbone.registers):
        yield f"{backbone.name} has no attention, so backbone.gaug and backbone.registers cannot be set"
    if not is_vim and backbone.scan != "auto":
        yield f"backbone.scan={backbone.scan} is for Vision Mamba (vim_...), not {backbone.name}"


def to_yaml(run: Run) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def _patch_in(name: str) -> int | None:
    """The patch size that one of our names states; timm's models say theirs when they are built."""
    if name.startswith("timm/"):
        return None
    tail = name.partition("_patch")[2].partition("_")[0]
    return int(tail) if tail.isdigit() else None


def _string_keys(node: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def _drop(tree: dict[str, Any], place: tuple[str, ...]) -> None:
    for section in place[:-1]:
        tree = tree[section] if isinstance(tree.get(section), dict) else {}
    tree.pop(place[-1], None)
