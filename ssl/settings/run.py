"""What a run is: its settings, each with its type, its bounds and what it does. `config` reads them from a recipe.

A setting whose default is `None` is derived by `defaults.resolve` from the number of images and the length of the
run, with the reason beside it; whatever the user writes wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from nearfar.ssl.settings import loss_recipes
from nearfar.ssl.settings.optimization import DistillSettings, LossSettings, OptimSettings, TrainSettings
from nearfar.ssl.settings.section import MAY_CHANGE, Range, Section, ViewProbs


class DataSettings(Section):
    path: str = Field(
        "",
        description="training images: class folders, a flat folder, a .txt list, an .npz, a .beton or .tar shards",
        json_schema_extra=MAY_CHANGE,  # what is in it may not change: checkpoints hold its fingerprint
    )
    val: str | None = Field(
        None,
        description="labeled images, scored during training (k-NN; fine-tuning: the classifier) and by `nearfar eval`",
        json_schema_extra=MAY_CHANGE,
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes of each rank (ffcv: threads) that decode and crop images; default: cores - 1, at most 8",
        json_schema_extra=MAY_CHANGE,
    )
    loader: Literal["auto", "ffcv", "pillow", "device"] = Field(
        "auto",
        description="what makes the views: pillow = Pillow, from any source; ffcv = compiled loops over a .beton file; "
        "device = the training device, with all images in its memory; auto = ffcv for a .beton, else pillow",
    )
    color_on: Literal["device", "loader"] = Field(
        "device",
        description="where colors are changed: on the training device, or in the ffcv loader (rounded to 8 bits)",
    )
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="the run stops when more than this share of the images cannot be used, and at least 20 of them "
        "(or a quarter of fewer than 80); 0: at the first",
        json_schema_extra=MAY_CHANGE,
    )
    min_side: int = Field(
        8, ge=1, description="an image with a shorter side than this, in pixels, counts as unreadable"
    )


class ViewSettings(Section):
    global_crops: ClassVar[int] = 2  # number of global views of each image

    global_crops_size: int = Field(224, ge=4, description="side of the two global views, in pixels")
    global_crops_scale: Range = Field(
        (0.4, 1.0), description="smallest and largest share of the image's area that a global view covers"
    )
    local_crops_size: int = Field(96, ge=4, description="side of a local view, in pixels")
    local_crops_scale: Range = Field(
        (0.05, 0.4), description="smallest and largest share of the image's area that a local view covers"
    )
    local_crops_number: int = Field(8, ge=0, description="number of local views of each image")
    ratio: Range = Field((3 / 4, 4 / 3), description="smallest and largest aspect ratio of a crop, width / height")
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
    blur_sigma: Range = Field(
        (0.1, 2.0), description="smallest and largest standard deviation of the blur, in pixels of the view"
    )
    solarize_prob: ViewProbs = Field(
        (0.0, 0.2, 0.0),
        description="probability of solarizing, for the first global, the second global and the local views",
    )
    solarize_threshold: int = Field(
        128, ge=0, le=256, description="solarizing inverts every color value from this one up (0 to 255)"
    )


class BackboneSettings(Section):
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
    img_size: int | None = Field(
        None,
        ge=4,
        description="image size the network is made for, in pixels, where that is not the size of the global views",
    )
    pos_size: int | None = Field(
        None, ge=1, description="image size of the learned positions' table, in pixels; 224 for DINO's public weights"
    )
    pos_antialias: bool = Field(
        False, description="learned positions reach other sizes as in timm and DINOv2 with registers, not as in DINO"
    )
    no_positions: bool = Field(False, description="our ViT without any positions, to compare with")
    pretrained: bool = Field(
        False,
        description="start from the weights that timm publishes (timm/NAME only; needs the internet, or its cache)",
    )
    layer_scale: float | None = Field(
        None,
        gt=0,
        description="each residual branch is multiplied by a learned vector that starts at this; 1e-5 in DINOv2",
    )
    scan: Literal["auto", "torch", "triton", "mamba"] = Field(
        "auto", description="what computes Vision Mamba's recurrence; auto = triton on a GPU, torch elsewhere"
    )
    weights: str | None = Field(
        None,
        description="weights to start from: a run's folder, a checkpoint, an exported file, or a .pth of DINO or timm",
    )


class HeadSettings(Section):
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
    ibot_separate: bool = Field(
        False, description="iBOT: patches have a head of their own (DINOv2's large models) and do not share that of CLS"
    )
    ibot_prototypes: int | None = Field(
        None, ge=2, description="number of prototypes of the patches' own head; default: head.prototypes"
    )


class EvalSettings(Section):
    size: int | None = Field(
        None,
        ge=4,
        description="side of an image for the scores, in pixels; default: that of the global views",
        json_schema_extra=MAY_CHANGE,
    )
    resize: int | None = Field(
        None,
        ge=4,
        description="shorter side to which an image is resized before its center is cut out; default: 256 / 224 of "
        "eval.size",
        json_schema_extra=MAY_CHANGE,
    )
    knn_every_epochs: float | None = Field(
        None,
        ge=0,
        description="epochs (1.5, say) between two k-NN scores during training; 0 = off",
        json_schema_extra=MAY_CHANGE,
    )
    knn_max_images: int = Field(
        5000,
        ge=1,
        description="most training images that the k-NN score during training looks at, and most images that it scores",
        json_schema_extra=MAY_CHANGE,
    )


class AnyRun(Section):
    """What the settings of every run hold, whatever is learned."""

    if TYPE_CHECKING:  # declared by each kind of run, in the order of its recipe
        name: str
        folder: str
        track: Literal["tensorboard", "wandb"]
        data: DataSettings
        backbone: BackboneSettings
        train: TrainSettings

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name

    @classmethod
    def as_asked(cls) -> type[AnyRun]:
        """This kind of run before anything is derived: the class that describes every setting."""
        return next(kind for kind in cls.__mro__ if AnyRun in kind.__bases__)


class Run(AnyRun):
    """One pretraining run, whole. `config.yaml` in its folder holds it with every derived value filled in."""

    name: str = Field(
        "",
        description="name of the run's folder; default: the recipe's name (adapt: adapt-IMAGES; distill: distilled; "
        "a fork: RUN-fork)",
    )
    folder: str = Field("runs", description="where run folders are", json_schema_extra=MAY_CHANGE)
    track: Literal["tensorboard", "wandb"] = Field(
        "tensorboard",
        description="where metrics and pictures go besides the run's own files: TensorBoard's events in its folder, or "
        "Weights & Biases (the package wandb)",
        json_schema_extra=MAY_CHANGE,
    )
    data: DataSettings = DataSettings()
    views: ViewSettings = ViewSettings()
    backbone: BackboneSettings = BackboneSettings()
    head: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    distill: DistillSettings = DistillSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, tree: Any) -> Any:
        return loss_recipes.with_bundle(tree)
