"""What a run is: its settings, each with its type, its bounds and what it does. `config` reads them from a recipe.

A setting whose default is `None` is derived by `defaults.resolve` from the number of images and the length of the
run, with the reason beside it; whatever the user writes wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from nearfar.ssl import loss_recipes

# Settings marked like this may differ when a run is continued: they do not change a single weight.
FREE: dict[str, JsonValue] = {"resume": "free"}


def _numbers(value: Any) -> Any:
    """Numbers separated by commas, in whatever brackets: 0.4,1.0 and (0.4, 1.0) are [0.4, 1.0]."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.strip().removeprefix("(").removesuffix(")").strip("[] ").split(",")]


Share = Annotated[tuple[float, float], BeforeValidator(_numbers)]  # a range: lowest, highest
ViewProbs = Annotated[tuple[float, float, float], BeforeValidator(_numbers)]  # first global, second global, local views


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


class DataSettings(Section):
    path: str = Field(
        "",
        description="training images: class folders, a flat folder, a .txt list, an .npz, a .beton or .tar shards",
        json_schema_extra=FREE,  # what is in it may not change: checkpoints hold its fingerprint
    )
    val: str | None = Field(
        None,
        description="labeled images, scored during training (k-NN; fine-tuning: the classifier) and by `nearfar eval`",
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
        description="the run stops when more than this share of the images cannot be used, and at least 20 of them "
        "(or a quarter of fewer than 80); 0: at the first",
        json_schema_extra=FREE,
    )
    min_side: int = Field(
        8, ge=1, description="an image with a shorter side than this, in pixels, counts as unreadable"
    )


class ViewSettings(Section):
    global_crops: ClassVar[int] = 2  # number of global views of each image

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
        None, ge=1, description="image size the learned positions are for, in pixels; 224 for DINO's public weights"
    )
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


class LossSettings(Section):
    recipe: Literal["dino", "dinov2", "dinov3"] = Field(
        "dino",
        description="a bundle of settings; what you write yourself wins. dinov2: iBOT with a head of its own, "
        "Sinkhorn-Knopp, KoLeo, layer scale, layer-wise decay, smaller crops; dinov3: these, Gram anchoring and a "
        "constant schedule",
    )
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
    ibot_weight: float = Field(
        0.0, ge=0, description="weight of iBOT's loss on hidden patches of the global views; 1 in DINOv2, 0 = off"
    )
    mask_sample_probability: float = Field(0.5, gt=0, le=1, description="iBOT: share of the global views with a mask")
    mask_ratio_min_max: Share = Field(
        (0.1, 0.5), description="iBOT: smallest and largest share of its patches that a mask hides"
    )
    anchor_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the anchor of features: 1 - cosine between the student's and those of the weights that "
        "the run began with, on the global views; 0 = off",
    )
    gram_weight: float = Field(
        0.0,
        ge=0,
        description="weight of Gram anchoring: the cosines between a view's patches stay as a frozen earlier teacher "
        "has them; 2 in DINOv3, 0 = off",
    )
    gram_start_epoch: float | None = Field(
        None, ge=0, description="epoch from which Gram anchoring is on; default: the last fifth of the run"
    )
    gram_teacher_epoch: float | None = Field(
        None,
        ge=0,
        description="epoch at which the teacher is copied as the anchor; default: loss.gram_start_epoch",
    )
    gram_teacher: str | None = Field(
        None,
        description="weights of the anchor, of the same architecture, in place of this run's teacher: a run's folder, "
        "a checkpoint, an exported file, or a .pth",
    )


class DistillSettings(Section):
    teacher: str | None = Field(
        None,
        description="learn from this frozen network and not by DINO: a run's folder, a checkpoint, an exported file, "
        "timm/NAME, or with distill.teacher_weights a name as in backbone.name",
        json_schema_extra=FREE,  # a file may be moved: checkpoints hold the digest of its weights
    )
    teacher_weights: str | None = Field(
        None,
        description="the teacher's weights, where distill.teacher is a name: a .pth of DINO or DINOv2, or a file of "
        "timm's; default: those that timm publishes",
        json_schema_extra=FREE,
    )
    teacher_size: int | None = Field(
        None,
        ge=1,
        description="side at which the teacher sees a global view, in pixels (the same view, resized); default: "
        "views.global_crops_size",
    )
    patch_weight: float = Field(1.0, ge=0, description="weight of the loss on patch tokens; that on CLS has 1")


class OptimSettings(Section):
    lr: float | None = Field(None, gt=0, description="highest learning rate; default: 5e-4 x batch size / 256")
    min_lr: float = Field(
        1e-6, ge=0, description="learning rate at the end of the run (the constant schedule does not get there)"
    )
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine",
        description="after the warm-up: cosine = to optim.min_lr, as DINO and DINOv2; constant = as DINOv3; wsd = "
        "constant (stable), then decay in a line to optim.min_lr. In the last two weight decay and the teacher's "
        "momentum are constant",
    )
    cooldown_epochs: float | None = Field(
        None, gt=0, description="wsd: epochs at the end in which the rate decays; default: a fifth of the run"
    )
    layerwise_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each layer learns at this times the rate of the one behind it; 0.9 in DINOv2, 1 = all alike",
    )
    backbone_lr_mult: float = Field(
        1.0, gt=0, description="the backbone learns at this times the rate of the heads; .1 in `nearfar adapt`"
    )
    freeze_backbone_epochs: float = Field(
        0.0, ge=0, description="epochs at the start in which the heads learn alone, for a backbone that was trained"
    )
    patch_embed_lr_mult: float = Field(
        1.0, gt=0, description="the patch embedding learns at this times its rate; 0.2 in DINOv2"
    )
    warmup_epochs: float | None = Field(
        None, ge=0, description="epochs in which the learning rate rises to its highest"
    )
    weight_decay: float = Field(
        0.04, ge=0, description="weight decay at the start of the run (biases and other 1-D tensors have none)"
    )
    weight_decay_end: float | None = Field(
        None,
        ge=0,
        description="weight decay at the end of the run, along a cosine; default: 0.4, and optim.weight_decay where "
        "optim.schedule is not cosine",
    )
    clip_grad: float = Field(3.0, ge=0, description="largest gradient norm of each tensor, as in DINO; 0 = no limit")
    teacher_momentum: float | None = Field(
        None,
        ge=0,
        le=1,
        description="momentum of the teacher at the start of the run; with the cosine schedule it rises to 1",
    )
    freeze_last_layer_epochs: float | None = Field(
        None, ge=0, description="epochs at the start in which the prototypes do not learn"
    )


class TrainSettings(Section):
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
        description="processes that share each batch; default: one for each GPU, by the cores on a CPU; under "
        "SLURM and torchrun as many as they start",
        json_schema_extra=FREE,  # sums in another order: the same run up to rounding, and said so when it is continued
    )
    shard: bool = Field(
        False,
        description="split student, teacher and optimizer over the processes (FSDP2), for backbones that no GPU holds",
        json_schema_extra=FREE,  # sums in another order, and said so
    )
    seed: int = Field(0, ge=0, description="seed of the weights, the order of the images, the views and drop-path")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="numbers used in the forward pass; auto = bf16 where the hardware multiplies it, else fp16 with a "
        "scaled loss on a GPU, and fp32 on a CPU",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="blocks through torch.compile, one graph for each size of view; auto = on a GPU with a compiler",
        json_schema_extra=FREE,  # sums are rounded differently, and said so when the run is continued
    )
    checkpoint_activations: bool = Field(
        False,
        description="keep only the inputs of the student's blocks and compute the rest again in the backward pass: "
        "far less memory, about a third more time, the same gradients",
        json_schema_extra=FREE,
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
    rank_timeout: float = Field(
        40.0,
        ge=0,
        description="seconds without a sign of life after which a process counts as lost, is named, and the others "
        "end; 0 = never, for a debugger that stops a process whole (gdb, SIGSTOP; a breakpoint of pdb does not)",
        json_schema_extra=FREE,
    )
    save_in_background: bool = Field(
        True,
        description="train on while a checkpoint is written, from a copy of weights and optimizer in the host's memory",
        json_schema_extra=FREE,
    )
    keep_last: int = Field(2, ge=1, description="number of checkpoints that are kept", json_schema_extra=FREE)
    keep_every: int | None = Field(
        None,
        ge=1,
        description="a checkpoint is written after each multiple of this many steps, and kept for good",
        json_schema_extra=FREE,
    )
    keep_best: bool = Field(
        False,
        description="a checkpoint is written with the best score so far (online k-NN; of a supervised run top-1), and "
        "kept until there is a better",
        json_schema_extra=FREE,
    )
    start_from: str | None = Field(
        None,
        description="fork: start from a checkpoint of another run, RUN (its newest), RUN@STEP or RUN@best, with "
        "student, teacher, heads and center; the same as --from",
        json_schema_extra=FREE,  # looked up once; a run that is continued has its own checkpoints
    )
    restart_schedule: bool = Field(
        False,
        description="of a fork: begin at step 0 of this run's own schedule with fresh moments, as other images, "
        "another batch size or a last stage need; false = go on at the step of the checkpoint",
    )


class EvalSettings(Section):
    size: int | None = Field(
        None,
        ge=4,
        description="side of an image for the scores, in pixels; default: that of the global views",
        json_schema_extra=FREE,
    )
    resize: int | None = Field(
        None,
        ge=4,
        description="shorter side to which an image is resized before its center is cut out; default: 256 / 224 of "
        "eval.size",
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

    name: str = Field("", description="name of the run's folder; default: the recipe's name")
    folder: str = Field("runs", description="where run folders are", json_schema_extra=FREE)
    track: Literal["tensorboard", "wandb"] = Field(
        "tensorboard",
        description="where metrics and pictures go besides the run's own files: TensorBoard's events in its folder, or "
        "Weights & Biases (the package wandb)",
        json_schema_extra=FREE,
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
        return loss_recipes.filled(tree)
