"""What a supervised run is: the settings of `nearfar finetune`, and what they are when its recipe does not say.

Images, backbone, steps and processes are set as in pretraining (`settings`); views, optimizer and scores are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from nearfar.ssl import config
from nearfar.ssl.disk import bounded_files
from nearfar.ssl.settings import defaults
from nearfar.ssl.settings.contradictions import (
    wrong_backbone,
    wrong_names,
    wrong_ranges,
    wrong_resize,
    wrong_side,
    wrong_slices,
)
from nearfar.ssl.settings.defaults import Derived, ResolvedData, ResolvedTrain
from nearfar.ssl.settings.optimization import TrainSettings
from nearfar.ssl.settings.run import (
    AnyRun,
    BackboneSettings,
    DataSettings,
    EvalSettings,
    HeadSettings,
    Run,
    ViewSettings,
)
from nearfar.ssl.settings.section import MAY_CHANGE, Range, Section
from nearfar.ssl.wording import counted


class OneView(ViewSettings):
    """Views of which each image has one, with the distributions of the first global view."""

    global_crops: ClassVar[int] = 1


class AugmentSettings(Section):
    """The one view of each image. Without colors by default: crops and flips as in most supervised recipes."""

    size: int = Field(224, ge=4, description="side of the view, in pixels")
    scale: Range = Field((0.08, 1.0), description="smallest and largest share of the image's area that it covers")
    ratio: Range = Field((3 / 4, 4 / 3), description="smallest and largest aspect ratio of the crop, width / height")
    hflip_prob: float = Field(0.5, ge=0, le=1, description="probability that it is flipped left to right")
    color_jitter_prob: float = Field(
        0.0, ge=0, le=1, description="probability that brightness, contrast, saturation and hue are changed"
    )
    brightness: float = Field(0.3, ge=0, le=1, description="color jitter: brightness within 1 plus or minus this")
    contrast: float = Field(0.3, ge=0, le=1, description="color jitter: contrast within 1 plus or minus this")
    saturation: float = Field(0.3, ge=0, le=1, description="color jitter: saturation within 1 plus or minus this")
    hue: float = Field(0.0, ge=0, le=0.5, description="color jitter: hue shifted by at most this share of the circle")
    grayscale_prob: float = Field(0.0, ge=0, le=1, description="probability that it loses its colors")
    blur_prob: float = Field(0.0, ge=0, le=1, description="probability of blur")
    blur_sigma: Range = Field((0.1, 2.0), description="smallest and largest standard deviation of the blur, in pixels")
    solarize_prob: float = Field(0.0, ge=0, le=1, description="probability that values from 128 up are inverted")

    def views(self) -> OneView:
        """As the loaders plan them."""
        shared = {name: getattr(self, name) for name in type(self).model_fields.keys() & OneView.model_fields.keys()}
        shared |= {name: (getattr(self, name), 0.0, 0.0) for name in ("blur_prob", "solarize_prob")}
        return OneView(**shared, global_crops_size=self.size, global_crops_scale=self.scale, local_crops_number=0)


class ClassifierSettings(Section):
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="what the linear head reads: the CLS token, or the mean over the patches"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of each target spread evenly over all classes")
    mixup: float = Field(
        0.0, ge=0, description="alpha of the beta distribution by which two images are blended; 0.8 in DeiT, 0 = off"
    )
    cutmix: float = Field(
        0.0, ge=0, description="alpha of the beta distribution of a box cut from another image; 1 in DeiT, 0 = off"
    )
    mix_prob: float = Field(1.0, ge=0, le=1, description="probability that the images of a step are mixed at all")
    cutmix_prob: float = Field(
        0.5, ge=0, le=1, description="with mixup and cutmix both on, probability that a mixed step is cut"
    )

    @property
    def mixes(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0


class FinetuneOptimSettings(Section):
    lr: float | None = Field(
        None,
        gt=0,
        description="highest learning rate; default: 5e-4 x batch size / 512 from scratch (DeiT), / 256 from weights",
    )
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the run")
    warmup_epochs: float | None = Field(
        None, ge=0, description="epochs in which the learning rate rises to its highest"
    )
    weight_decay: float = Field(0.05, ge=0, description="weight decay (biases and other 1-D tensors have none)")
    layerwise_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="each layer learns at this times the rate of the one behind it; default: 0.75 from weights, else 1",
    )
    patch_embed_lr_mult: float = Field(1.0, gt=0, description="the patch embedding learns at this times its rate")
    clip_grad: float = Field(0.0, ge=0, description="largest gradient norm of each tensor; 0 = no limit")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the moving average of the weights that is scored and saved; 0 = the weights themselves",
    )


class FinetuneEvalSettings(Section):
    size: int | None = Field(
        None, ge=4, description="side of an image when it is classified, in pixels; default: augment.size",
        json_schema_extra=MAY_CHANGE,
    )  # fmt: skip
    resize: int | None = Field(
        None,
        ge=4,
        description="shorter side to which it is resized before its center is cut out; default: 256 / 224 of eval.size",
        json_schema_extra=MAY_CHANGE,
    )
    every_epochs: float | None = Field(
        None,
        ge=0,
        description="epochs between two scores on data.val during training; 0 = only at the end",
        json_schema_extra=MAY_CHANGE,
    )


class FinetuneRun(AnyRun):
    """One supervised run, whole. `config.yaml` in its folder holds it with every derived value filled in."""

    name: str = Field("", description="name of the run's folder; default: the recipe's name")
    folder: str = Field("runs", description="where run folders are", json_schema_extra=MAY_CHANGE)
    track: Literal["tensorboard", "wandb"] = Field(
        "tensorboard",
        description="where metrics and pictures go besides the run's own files: TensorBoard's events in its folder, or "
        "Weights & Biases (the package wandb)",
        json_schema_extra=MAY_CHANGE,
    )
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    backbone: BackboneSettings = BackboneSettings()
    classifier: ClassifierSettings = ClassifierSettings()
    optim: FinetuneOptimSettings = FinetuneOptimSettings()
    train: TrainSettings = TrainSettings()
    eval: FinetuneEvalSettings = FinetuneEvalSettings()

    @property
    def views(self) -> OneView:
        return self.augment.views()

    @property
    def from_weights(self) -> bool:
        return bool(self.backbone.weights or self.backbone.pretrained)

    def as_pretraining(self) -> Run:
        """Backbone, images and sizes as a pretraining run has them: what frozen features need."""
        return Run(
            name=self.name,
            folder=self.folder,
            data=self.data,
            views=ViewSettings(global_crops_size=self.augment.size, local_crops_number=0),
            backbone=self.backbone,
            head=HeadSettings(pooling=self.classifier.pooling),
            train=self.train,
            eval=EvalSettings(size=self.eval.size, resize=self.eval.resize),
        )

    def contradictions(self) -> Iterator[str]:
        """Contradictions between settings that are each valid alone, in words."""
        yield from wrong_names(self)
        yield from wrong_backbone(self.backbone)
        yield from wrong_slices(self)
        yield from wrong_ranges("augment", self.augment, ("scale", "ratio", "blur_sigma"), ("scale",))
        yield from wrong_side("augment.size", self.augment.size, self.backbone)
        yield from wrong_resize(self.eval.resize, self.eval.size or self.augment.size)
        if self.optim.warmup_epochs is not None and self.optim.warmup_epochs > self.train.epochs:
            yield f"optim.warmup_epochs={self.optim.warmup_epochs:g} is longer than train.epochs={self.train.epochs}"
        if self.train.start_from or self.train.restart_schedule:
            yield (
                "train.start_from (--from) and train.restart_schedule are for pretraining: name the run whose backbone "
                "is to be trained as backbone.weights"
            )
        if self.train.shard:
            yield "train.shard=true is for pretraining: nearfar finetune does not split networks over processes"
        ranks = self.train.world_size or 1
        if self.classifier.mixes and self.train.batch_size // ranks % 2:
            yield (
                f"classifier.mixup and classifier.cutmix mix pairs of images, and the {self.train.batch_size // ranks} "
                "of a step in each process are an odd number: choose another train.batch_size"
            )


COMMAND = "nearfar finetune"


def load(recipe: Path | None, overrides: Sequence[str] = ()) -> FinetuneRun:
    """A supervised run from a YAML recipe and `key.sub=value` overrides. Raises UserError with all that is wrong."""
    return config.read(FinetuneRun, recipe, overrides, contradictions, COMMAND)


def contradictions(run: FinetuneRun) -> list[str]:
    return list(run.contradictions())


def recorded(tree: dict[str, Any]) -> Run | FinetuneRun:
    """The settings that a run's config.yaml or checkpoint holds: which kind they are is seen from their sections.

    Raises:
        UserError: another version of nearfar wrote them.
    """
    if "classifier" in tree:
        return config.validated(FinetuneRun, tree, contradictions, command=COMMAND)
    return config.validate(tree)


def recorded_in(file: Path) -> Run | FinetuneRun:
    """`recorded` of a YAML file. Raises UserError where it cannot be read, too."""
    tree = bounded_files.read_yaml(file, "recipe")
    return recorded({"name": file.stem} | {key: value for key, value in tree.items() if value is not None})


class ResolvedFinetuneOptim(FinetuneOptimSettings):
    lr: float
    warmup_epochs: float
    layerwise_decay: float


class ResolvedFinetuneEval(FinetuneEvalSettings):
    size: int
    resize: int
    every_epochs: float


class ResolvedFinetune(FinetuneRun):
    """A supervised run with every derived value filled in."""

    data: ResolvedData
    optim: ResolvedFinetuneOptim
    train: ResolvedTrain
    eval: ResolvedFinetuneEval


def resolve_finetune(
    run: FinetuneRun, images: int, cores: int = 1, *, world_size: int | None = None, saved: FinetuneRun | None = None
) -> tuple[ResolvedFinetune, list[Derived]]:
    """The settings that a supervised run trains with, and which of them were derived (see `defaults.resolve`).

    Raises:
        UserError: they contradict the ranks, or the run that is continued.
    """
    if world_size is not None:
        run = defaults.on_ranks(run, world_size)
        config.refuse(contradictions(run))
    if saved is not None:
        run = defaults.continued(run, saved)
    epochs, batch, weights = run.train.epochs, run.train.batch_size, run.from_weights
    size = run.eval.size or run.augment.size
    per = 256 if weights else 512
    warmup, decay = round(min(5.0, 0.1 * epochs), 2), 0.75 if weights else 1.0
    origin = "it starts from weights" if weights else "it starts from scratch"
    candidates = [
        Derived("data.workers", min(8, cores - 1), f"{counted(cores, 'core')} a rank"),
        Derived("optim.lr", 5e-4 * batch / per, f"5e-4 x {batch} / {per}: {origin}"),
        Derived("optim.warmup_epochs", warmup, "5 epochs or 10 % of the run"),
        Derived("optim.layerwise_decay", decay, origin),
        Derived("train.world_size", 1, "a process that was started alone"),
        Derived("train.threads", cores, f"{counted(cores, 'core')} a rank"),
        Derived("eval.size", size, "augment.size"),
        Derived("eval.resize", round(size * 256 / 224), f"{size} x 256 / 224, as is usual"),
        Derived("eval.every_epochs", max(1.0, epochs // 10), "about ten scores a run"),
    ]
    filled, derived = defaults.filled(run, candidates)
    return defaults.as_resolved(ResolvedFinetune, filled), derived
