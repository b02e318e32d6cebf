"""DINO, and what came after it on top: the student's network, what it learns, and how both are built from settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from nearfar.ssl.backbones import Backbone, Tokens, create
from nearfar.ssl.heads.dino import DINOHead
from nearfar.ssl.learning.gram import gram_loss
from nearfar.ssl.learning.health import teacher_health
from nearfar.ssl.learning.ibot import PatchLoss
from nearfar.ssl.learning.learner import HeadedBackbone, Learner, Outputs
from nearfar.ssl.learning.losses import DINOLoss, coding_rate, cosine_loss, koleo
from nearfar.ssl.learning.masks import BlockMasks, Masks
from nearfar.ssl.parallel.sharding import whole
from nearfar.ssl.settings.defaults import ResolvedRun
from nearfar.ssl.settings.run import Run


class NetworkOutputs(NamedTuple):
    """Outputs for a batch of views. Shapes: V views of B images, G of them global, N patches, M hidden ones."""

    logits: Tensor  # (V, B, K)
    features: Tensor  # (V, B, D)
    patches: Tensor  # (G * B, N, D): patch tokens of the global views
    patch_logits: Tensor | None  # (M, K of the patches' head): of hidden patches, with masks only


class Network(HeadedBackbone):
    """A backbone and its projection head, which reads CLS or the mean over the patches.

    With iBOT the patches have a head of their own (`patch_head`), or share that one.
    """

    head: DINOHead

    def __init__(
        self,
        backbone: Backbone,
        head: DINOHead,
        pooling: Literal["cls", "mean"] = "cls",
        patch_head: DINOHead | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.pooling = pooling
        self.patch_head = patch_head
        self.outputs = len(head.prototypes)
        self.head_title = f"{self.outputs:,} prototypes"

    def forward(self, groups: list[Tensor], masks: Masks | None = None, hide: bool = False) -> NetworkOutputs:
        """Groups of equally sized views [(G, B, 3, s, s), ...], the global one first. One backbone pass per size.

        masks: the patches of the global views whose logits are wanted; `hide`: the mask token stands in for them.
        """
        first, *others = (group.flatten(0, 1) for group in groups)
        seen = self.backbone(first, masks.hidden.flatten(0, 1)) if masks and hide else self.backbone(first)
        tokens: list[Tokens] = [seen, *(self.backbone(group) for group in others)]
        features = torch.cat([each.pooled(self.pooling) for each in tokens])
        batch = groups[0].shape[1]
        logits, patch_logits = self.head(features), None
        if masks is not None:
            rows = seen.patches.flatten(0, 1)[masks.rows]
            patch_logits = (self.patch_head or self.head)(rows, masks.weights > 0)
        return NetworkOutputs(
            logits.unflatten(0, (-1, batch)), features.unflatten(0, (-1, batch)), seen.patches, patch_logits
        )


class LossWeights(NamedTuple):
    """What each part that is added to DINO's loss counts; 0 = off."""

    koleo: float = 0.0
    coding_rate: float = 0.0
    ibot: float = 0.0
    anchor: float = 0.0


class DINOLearner(Learner):
    """DINO: a student that matches, on every view, what its own moving average says of the global views.

    Both networks run in training mode, as in the reference: batch norm (of a head or of a convolutional backbone)
    uses the statistics of the step in each. The teacher must be built without drop-path. What came after DINO is added
    to its loss: KoLeo, the coding rate, iBOT where a step has masks, and what keeps patches (Gram anchoring) and
    features near those of `anchor`, a frozen earlier teacher or the weights that the run began with.
    """

    student: Network
    teacher: Network

    def __init__(
        self,
        student: Network,
        teacher: Network,
        loss: DINOLoss,
        weights: LossWeights,
        ibot: PatchLoss | None = None,
        anchor: Backbone | None = None,
    ) -> None:
        super().__init__(student, teacher)
        self.loss = loss
        self.weights = weights
        self.ibot = ibot
        self.anchor = anchor
        if anchor is not None:
            anchor.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.anchor is not None:
            self.anchor.eval()
        return self

    @property
    def frozen(self) -> Sequence[Backbone]:
        return () if self.anchor is None else (self.anchor,)

    def health(self, outputs: Outputs) -> dict[str, float]:
        """Of the teacher's probabilities (G, B, K) and features (G, B, D)."""
        return teacher_health(*outputs.monitored)

    @torch.no_grad()
    def teacher_outputs(self, global_views: Tensor, masks: Masks | None = None) -> NetworkOutputs:
        """Global views (G, B, 3, s, s), nothing hidden, and the logits of the patches of `masks`."""
        seen: NetworkOutputs = self.teacher([global_views], masks)
        return seen

    def student_outputs(self, groups: list[Tensor], masks: Masks | None = None) -> NetworkOutputs:
        """All views, grouped by size; of the global ones the patches of `masks` are hidden."""
        seen: NetworkOutputs = self.student(groups, masks, hide=True)
        return seen

    def forward(
        self, groups: list[Tensor], teacher_temp: float, masks: Masks | None = None, gram_weight: float = 0.0
    ) -> Outputs:
        """Normalized views, the global group first -> the loss and the values that are monitored."""
        teacher = self.teacher_outputs(groups[0], masks)
        probabilities = self.loss.teacher_probabilities(teacher.logits, teacher_temp)
        student = self.student_outputs(groups, masks)
        loss, parts = self.loss(student.logits, probabilities), {}
        self.loss.note_teacher(teacher.logits)
        weights = {**self.weights._asdict(), "gram": gram_weight}
        if self.weights.koleo:
            parts["koleo"] = koleo(student.features[: len(groups[0])])
        if self.weights.coding_rate:
            parts["coding_rate"] = -coding_rate(student.features)
        if masks is not None:
            parts["ibot"] = self.ibot_loss(student, teacher, masks, teacher_temp)
        if gram_weight or self.weights.anchor:
            anchored = self.anchor_tokens(groups[0])
            if gram_weight:
                parts["gram"] = gram_loss(student.patches, anchored.patches)
            if self.weights.anchor:
                seen = anchored.pooled(self.student.pooling)
                parts["anchor"] = cosine_loss(student.features[: len(groups[0])].flatten(0, 1), seen)
        loss = sum((weights[name] * part for name, part in parts.items()), loss)
        monitored = (probabilities, teacher.features)
        return Outputs(loss, monitored, {name: part.detach() for name, part in parts.items()})

    def ibot_loss(self, student: NetworkOutputs, teacher: NetworkOutputs, masks: Masks, teacher_temp: float) -> Tensor:
        """The student's answers for the patches that it did not see against the teacher's, who saw them: scalar."""
        assert self.ibot is not None and student.patch_logits is not None and teacher.patch_logits is not None
        probabilities = self.ibot.teacher_probabilities(teacher.patch_logits, masks.weights, teacher_temp)
        self.ibot.note_teacher(teacher.patch_logits, masks.weights)
        loss: Tensor = self.ibot(student.patch_logits, probabilities, masks.weights, len(student.patches))
        return loss

    @torch.no_grad()
    def anchor_tokens(self, global_views: Tensor) -> Tokens:
        """What the anchor sees in global views (G, B, 3, s, s), as the student saw them: of G * B images."""
        assert self.anchor is not None
        tokens: Tokens = self.anchor(global_views.flatten(0, 1))
        return tokens

    @torch.no_grad()
    def take_anchor(self) -> None:
        """From now on Gram anchoring keeps what the teacher's patches are like now."""
        assert self.anchor is not None
        now = self.teacher.backbone.state_dict()
        for name, tensor in self.anchor.state_dict().items():
            tensor.copy_(whole(now[name]))

    def freeze_prototypes(self, frozen: bool) -> None:
        """To be called before the forward pass: in the first epochs the prototypes stay as they are (DINO, appendix A)
        and no gradient is computed for them.
        """
        for head in (self.student.head, self.student.patch_head):
            if head is not None:
                head.prototypes.requires_grad_(not frozen)

    def after_step(self, momentum: float, not_finite: Tensor | None = None) -> None:
        """To be called after the optimizer's step: center and teacher follow the passes before it.

        not_finite: float32 scalar on the learner's device; where it is 1, nothing changes.
        """
        self.loss.update_center(not_finite)
        if self.ibot is not None:
            self.ibot.update_center(not_finite)
        super().after_step(momentum, not_finite)


def build_backbone(run: Run, drop_path: float = 0.0, file: str | None = None) -> Backbone:
    """The backbone of the settings with random weights, or with those of a file."""
    settings = run.backbone.model_dump(exclude={"drop_path", "weights", "img_size"})
    settings["mask_token"] = run.loss.ibot_weight > 0
    size = run.backbone.img_size or run.views.global_crops_size
    return create(img_size=size, drop_path=drop_path, weights=file, **settings)


def untrained_backbone(run: Run) -> Backbone:
    """The backbone that the student of a run begins with where it takes no weights, in evaluation mode."""
    torch.manual_seed(run.train.seed)
    random = run.backbone.model_copy(update={"pretrained": False})
    return build_backbone(run.model_copy(update={"backbone": random})).eval().requires_grad_(False)


def build_dino_learner(run: ResolvedRun, weights: bool = True) -> DINOLearner:
    """Student and teacher as the settings say, seeded: the same weights on every machine and every start.

    weights: read backbone.weights, if set; a run that continues from a checkpoint does not need that file any more.
    """
    torch.manual_seed(run.train.seed)
    backbone, head, loss = run.backbone, run.head, run.loss
    sinkhorn = loss.centering == "sinkhorn_knopp"

    def bare(drop_path: float, file: str | None = None) -> Backbone:
        return build_backbone(run, drop_path, file if weights else None)

    def projection(width: int, prototypes: int) -> DINOHead:
        return DINOHead(width, prototypes, head.hidden_dim, head.bottleneck_dim, head.batch_norm)

    def network(drop_path: float, file: str | None = None) -> Network:
        built = bare(drop_path, file)
        of_cls = projection(built.embed_dim, head.prototypes)
        of_patches = projection(built.embed_dim, patch_prototypes) if head.ibot_separate else None
        return Network(built, of_cls, head.pooling, of_patches)

    patch_prototypes = head.ibot_prototypes or head.prototypes
    student, teacher = network(backbone.drop_path, backbone.weights), network(0.0)
    dino = DINOLoss(head.prototypes, loss.student_temp, loss.center_momentum, sinkhorn)
    ibot = PatchLoss(patch_prototypes, loss.student_temp, loss.center_momentum, sinkhorn) if loss.ibot_weight else None
    anchor = bare(0.0, loss.gram_teacher) if loss.gram_weight or loss.anchor_weight else None
    counts = LossWeights(loss.koleo_weight, loss.coding_rate_weight, loss.ibot_weight, loss.anchor_weight)
    learner = DINOLearner(student, teacher, dino, counts, ibot, anchor)
    if anchor is not None and not loss.gram_teacher:
        learner.take_anchor()
    return learner.train()


def build_block_masks(run: ResolvedRun, patch_size: int, rank: int = 0) -> BlockMasks | None:
    """The masks that iBOT needs on one of the run's ranks; None where it is off."""
    loss, side = run.loss, -(-run.views.global_crops_size // patch_size)
    if not loss.ibot_weight:
        return None
    images = run.train.batch_size // run.train.world_size
    share, ratios = loss.mask_sample_probability, loss.mask_ratio_min_max
    return BlockMasks(run.train.seed, share, ratios, (side, side), images, rank)
