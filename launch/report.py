"""The report of a run with its pictures: what the network attends to and how it groups patches, on the run's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.eval.report import write_report
from nearfar.ssl import checkpoint
from nearfar.ssl.errors import BadImage, UserError

if TYPE_CHECKING:
    import torch

    from nearfar.launch.score import Subject
    from nearfar.ssl.data.sources.base import Source

PICTURED = 6  # images in the attention and PCA pictures


def report_run(run: Path, subject: Subject | None = None) -> Path:
    """Draw the pictures that are not there or older than the weights, write report.html, and return its path.

    subject: the run's weights, where they are loaded already. What cannot be drawn is named on the page, and why.

    Raises:
        UserError: as `write_report`.
    """
    reasons: dict[str, str] = {}
    if not run.is_dir():
        return write_report(run)
    try:
        weights = checkpoint.weights_file(run)
        if _due(run, weights):
            reasons = draw_tokens(run, subject)
    except (UserError, OSError) as error:
        reasons = dict.fromkeys(("attention.png", "pca.png"), str(error))
    return write_report(run, reasons)


def draw_tokens(run: Path, subject: Subject | None = None) -> dict[str, str]:
    """Draw attention.png and pca.png of a few images of the run: of data.val, else of data.path.

    Returns what could not be drawn, and why: a network may have no attention maps. One of older weights is removed.

    Raises:
        UserError: no weights, or no images that can be read.
        OSError: the pictures cannot be written.
    """
    from nearfar.eval.pictures import attention_maps, save, tile, token_pca
    from nearfar.launch.score import Subject
    from nearfar.ssl.data import open_source
    from nearfar.ssl.data.transforms.normalize import normalize_pixels

    subject = subject or Subject.of(run)
    data = subject.run.data
    images = normalize_pixels(_views(open_source(data.val or data.path), subject.image_size))
    images = images.to(next(subject.backbone.parameters()).device)
    reasons: dict[str, str] = {}
    save(tile(token_pca(subject.backbone, images)), run / "pca.png")
    try:
        save(tile(attention_maps(subject.backbone, images), columns=1), run / "attention.png")
    except UserError as error:
        (run / "attention.png").unlink(missing_ok=True)
        reasons["attention.png"] = str(error)
    return reasons


def _due(run: Path, weights: Path) -> bool:
    """Is a picture missing, or older than the weights?"""
    pictures = (run / "pca.png", run / "attention.png")
    return any(not each.is_file() or each.stat().st_mtime < weights.stat().st_mtime for each in pictures)


def _views(source: Source, size: int) -> torch.Tensor:
    """A few readable images spread over the source: uint8 (n, 3, size, size)."""
    import torch

    from nearfar.ssl.data.transforms.eval_view import eval_view

    views, told = [], ""
    count = len(source)
    for i in torch.linspace(0, count - 1, min(PICTURED, count)).long().tolist():
        for j in range(i, min(i + 10, count)):  # a damaged image: the next one
            try:
                views.append(torch.as_tensor(eval_view(source.read(j), size, size)))
            except BadImage as error:
                told = f" {error}"
                continue
            break
    if not views:
        raise UserError(f"No image of the run could be read.{told}")
    return torch.stack(views)
