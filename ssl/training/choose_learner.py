"""Which learner a run trains, decided here alone; and the frozen teachers that runs are distilled from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.backbones.adapter import Adapter
from nearfar.ssl.backbones.factory import OUR_NAME, VIM_NAME
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import UserError
from nearfar.ssl.given_weights import load_given
from nearfar.ssl.learning.dino import build_backbone, build_dino_learner
from nearfar.ssl.learning.distill import Distiller, FrozenTeacher, Pooling, ProjectedStudent
from nearfar.ssl.learning.learner import Learner
from nearfar.ssl.patches import whole_patches
from nearfar.ssl.settings.defaults import ResolvedRun
from nearfar.ssl.settings.optimization import DistillSettings


def learner_of(run: ResolvedRun, weights: bool = True) -> Learner:
    """The learner of a run: distilling where it names a teacher, DINO elsewhere; seeded as `build_dino_learner`.

    Raises:
        UserError: the backbone, the teacher or their files are not what the settings need, or the images that a
            backbone is to see are smaller than one of its patches.
    """
    learner: Learner = build_distiller(run, weights) if run.distill.teacher else build_dino_learner(run, weights)
    sizes = {"views.global_crops_size": run.views.global_crops_size, "eval.size": run.eval.size}
    if run.views.local_crops_number:
        sizes["views.local_crops_size"] = run.views.local_crops_size
    _check_patch(learner.student.backbone, run.backbone.name, sizes)
    if run.optim.freeze_batch_norm:
        for network in (learner.student, learner.teacher):
            network.backbone.keep_statistics()
    return learner


def _check_patch(backbone: Backbone, name: str, sizes: dict[str, int]) -> None:
    """Is each of the image `sizes`, by its setting, at least a patch? Known of timm's networks only once they are made;
    of ours `config` knows before."""
    small = {key: size for key, size in sizes.items() if size < backbone.patch_size}
    if not small or not (isinstance(backbone, Adapter) and backbone.isotropic):  # others take images of any size
        return
    too_small = " and ".join(f"{key}={size}" for key, size in small.items())
    larger = " ".join(f"{key}={backbone.patch_size}" for key in small)
    raise UserError(
        f"{name} cuts images into patches of {backbone.patch_size} pixels, and {too_small} "
        f"{'is' if len(small) == 1 else 'are'} smaller than one patch. Choose {larger} or a multiple, or a network of "
        "smaller patches."
    )


def build_distiller(run: ResolvedRun, weights: bool = True) -> Distiller:
    """The student of the settings, with the very weights at the start that it has when trained alone, and a teacher.

    weights: read backbone.weights, if set; the teacher's are always read.
    """
    torch.manual_seed(run.train.seed)
    student = build_backbone(run, run.backbone.drop_path, run.backbone.weights if weights else None)
    average = build_backbone(run)
    source = frozen_teacher(run.distill, run.views.global_crops_size)
    torch.manual_seed(run.train.seed)
    width, pooling = source.backbone.embed_dim, run.head.pooling
    pair = (ProjectedStudent(student, width, pooling), ProjectedStudent(average, width, pooling))
    learner = Distiller(*pair, source, run.distill.patch_weight)
    learner.train()
    return learner


def frozen_teacher(settings: DistillSettings, view_size: int) -> FrozenTeacher:
    """The teacher that `settings` name, for global views of `view_size` pixels.

    Raises:
        UserError: neither a file nor a name, an architecture that nobody knows, no weights, or a size of image that it
            does not take.
    """
    title = str(settings.teacher)
    size = settings.teacher_size or view_size
    backbone, pooling = _named(title, settings.teacher_weights, size) if _is_name(title) else _described(settings)
    backbone.eval().requires_grad_(False)
    _check_size(backbone, title, size, settings.teacher_size is None)
    return FrozenTeacher(backbone, title, digests.of_tensors(backbone.state_dict()), pooling, size / view_size)


def _is_name(title: str) -> bool:
    return title.startswith("timm/") or any(form.fullmatch(title) for form in (OUR_NAME, VIM_NAME))


def _named(name: str, file: str | None, size: int) -> tuple[Backbone, Pooling]:
    """A network of timm's or ours by name, with published weights or those of a file."""
    is_timm = name.startswith("timm/")
    if not file and not is_timm:
        raise UserError(
            f"distill.teacher={name} is a network without published weights here: give the file of them as "
            "distill.teacher_weights=FILE, or take a run's folder or timm/NAME as the teacher."
        )
    # DINO's own numbers at every size: our plain ViT keeps their table of positions (see `create`).
    plain = name.startswith("vit_") and "_lgp" not in name and "_rope" not in name
    options: dict[str, Any] = {"pos_size": 224} if plain else {}
    try:
        return create(name, img_size=size, pretrained=is_timm and not file, weights=file, **options), "cls"
    except UserError as error:
        how = "" if file else f" For a teacher: distill.teacher={name} with distill.teacher_weights=FILE."
        raise UserError(f"The teacher cannot be made. {error}{how}") from error


def _described(settings: DistillSettings) -> tuple[Backbone, Pooling]:
    """A network from a file that says what it is: ours, or a public one whose tensors tell."""
    path = Path(str(settings.teacher)).expanduser()
    if settings.teacher_weights:
        raise UserError(
            f"distill.teacher_weights={settings.teacher_weights} needs the name of a network as distill.teacher "
            f"(vit_small_patch16, timm/NAME), and {settings.teacher} is none."
        )
    if not path.exists():
        raise UserError(
            f"There is no teacher {settings.teacher}: neither a file nor a folder of that name, nor a network's name. "
            "distill.teacher is a run's folder, an exported .safetensors, timm/NAME, or (with "
            "distill.teacher_weights=FILE) a name such as vit_small_patch16. A run needs its teacher to continue, too."
        )
    try:
        backbone, about = load_given(path)
        head = about.get("run", {}).get("head", {})
        return backbone, "mean" if head.get("pooling") == "mean" else "cls"
    except UserError as error:
        raise UserError(
            f"The teacher cannot be read. {error} A public file of weights needs the name of its network as well: "
            f"distill.teacher=NAME distill.teacher_weights={settings.teacher}."
        ) from error


def _check_size(backbone: Backbone, title: str, size: int, of_views: bool) -> None:
    """Can it see images of `size` pixels? One try tells, on the CPU."""
    patch, key = backbone.patch_size, "views.global_crops_size" if of_views else "distill.teacher_size"
    if size % patch:
        less = "are smaller than" if size < patch else "cannot be cut into"
        raise UserError(
            f"The teacher {title} has patches of {patch} pixels, and the views it sees ({key}={size}) {less} them. "
            f"Let it see them larger or smaller: distill.teacher_size={whole_patches(size, patch)}, say."
        )
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, size, size))
    except UserError as error:
        made = backbone.arch["img_size"]
        raise UserError(
            f"The teacher {title} cannot see views of {size} pixels ({key}): {error} It is made for {made}: "
            f"distill.teacher_size={made} shows it the same views at that size."
        ) from error
