"""How a run learns: its loss, a frozen teacher in place of it, the optimizer, and the training itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nearfar.ssl.settings.section import MAY_CHANGE, Range, Section


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
    coding_rate_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the coding rate of the features of all views, which is raised (SimDINO): they use all "
        "their directions alike; 0 = off",
    )
    ibot_weight: float = Field(
        0.0, ge=0, description="weight of iBOT's loss on hidden patches of the global views; 1 in DINOv2, 0 = off"
    )
    mask_sample_probability: float = Field(0.5, gt=0, le=1, description="iBOT: share of the global views with a mask")
    mask_ratio_min_max: Range = Field(
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
        json_schema_extra=MAY_CHANGE,  # a file may be moved: checkpoints hold the digest of its weights
    )
    teacher_weights: str | None = Field(
        None,
        description="the teacher's weights, where distill.teacher is a name: a .pth of DINO or DINOv2, or a file of "
        "timm's; default: those that timm publishes",
        json_schema_extra=MAY_CHANGE,
    )
    teacher_size: int | None = Field(
        None,
        ge=1,
        description="side at which the teacher sees a global view, in pixels (the same view, resized); default: "
        "views.global_crops_size",
    )
    patch_weight: float = Field(1.0, ge=0, description="weight of the loss on patch tokens; that on CLS has 1")


class OptimSettings(Section):
    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, as DINO; muon: the matrices of linear layers and convolutions move along their "
        "orthogonalized momentum, with steps of AdamW's size, and all else by AdamW",
    )
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
        description="factor from each layer's rate to that of the layer before it; 0.9 in DINOv2, 1 = all alike",
    )
    backbone_lr_mult: float = Field(
        1.0, gt=0, description="the backbone learns at this times the rate of the heads; .1 in `nearfar adapt`"
    )
    freeze_backbone_epochs: float = Field(
        0.0, ge=0, description="epochs at the start in which the heads learn alone, for a backbone that was trained"
    )
    freeze_batch_norm: bool = Field(
        False,
        description="batch norms of a backbone that was trained keep its statistics, in place of those of each step "
        "(a ViT or Vision Mamba has none); true in `nearfar adapt`",
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
        description="momentum of the teacher at the start of the run",
    )
    teacher_momentum_end: float | None = Field(
        None,
        ge=0,
        le=1,
        description="momentum of the teacher at the end of the run, along a cosine; optim.teacher_momentum where "
        "optim.schedule is not cosine",
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
        description="parts in which each process computes its share of a step, for less memory: the gradient is that "
        "of the whole, but batch norm, Sinkhorn-Knopp, KoLeo and the coding rate see one part at a time",
    )
    world_size: int | None = Field(
        None,
        ge=1,
        description="processes that share each batch; default: one for each GPU, by the cores on a CPU; under "
        "SLURM and torchrun as many as they start",
        json_schema_extra=MAY_CHANGE,  # the same run up to the rounding of sums, which is said when it is continued
    )
    shard: bool = Field(
        False,
        description="split student, teacher and optimizer over the processes (FSDP2), where one GPU is too small",
        json_schema_extra=MAY_CHANGE,  # sums in another order, and said so
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
        json_schema_extra=MAY_CHANGE,  # sums are rounded differently, and said so when the run is continued
    )
    checkpoint_activations: bool = Field(
        False,
        description="keep only the inputs of the student's blocks and compute the rest again in the backward pass: "
        "far less memory, one more forward pass of the student, the same gradients",
        json_schema_extra=MAY_CHANGE,
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="threads of each process on a CPU; a part of the run, since the rounding of sums depends on it",
    )
    log_every_steps: int = Field(
        10, ge=1, description="steps between two lines of metrics", json_schema_extra=MAY_CHANGE
    )
    save_every_minutes: float = Field(
        5.0, gt=0, description="minutes between two checkpoints", json_schema_extra=MAY_CHANGE
    )
    save_every_steps: int | None = Field(
        None,
        ge=1,
        description="steps between two checkpoints, besides those by save_every_minutes",
        json_schema_extra=MAY_CHANGE,
    )
    rank_timeout: float = Field(
        40.0,
        ge=0,
        description="seconds without a sign of life after which a process counts as lost, is named, and the others "
        "end; 0 = never, for a debugger that stops a process whole (gdb, SIGSTOP; a breakpoint of pdb does not)",
        json_schema_extra=MAY_CHANGE,
    )
    save_in_background: bool = Field(
        True,
        description="train on while a checkpoint is written, from a copy of weights and optimizer in the host's memory",
        json_schema_extra=MAY_CHANGE,
    )
    keep_last: int = Field(2, ge=1, description="number of checkpoints that are kept", json_schema_extra=MAY_CHANGE)
    keep_every: int | None = Field(
        None,
        ge=1,
        description="a checkpoint is written after each multiple of this many steps, and kept for good",
        json_schema_extra=MAY_CHANGE,
    )
    keep_best: bool = Field(
        False,
        description="a checkpoint is written with the best score so far (online k-NN; of a supervised run top-1), and "
        "kept until there is a better",
        json_schema_extra=MAY_CHANGE,
    )
    start_from: str | None = Field(
        None,
        description="fork: start from a checkpoint of another run, RUN (its newest), RUN@STEP or RUN@best, with "
        "student, teacher, heads and center; the same as --from",
        json_schema_extra=MAY_CHANGE,  # looked up once; a run that is continued has its own checkpoints
    )
    restart_schedule: bool = Field(
        False,
        description="of a fork: begin at step 0 of this run's own schedule with fresh moments, as other images, "
        "another batch size or a last stage need; false = go on at the step of the checkpoint",
    )
