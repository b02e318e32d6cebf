"""The page of a supervised run: report.html with its accuracy, curves, classes, confusion and settings."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.eval import results
from nearfar.eval.pages.curves import Panel, curves
from nearfar.eval.pages.mistakes import confusion_matrix
from nearfar.eval.pages.page import folded, missing, page, section, soft, text_table, write_page
from nearfar.eval.pages.provenance import environment_section, lineage_section, settings_section, views_section
from nearfar.eval.pages.robustness_page import position_section, robustness_section
from nearfar.eval.pages.summary import scores_section
from nearfar.eval.results import Score
from nearfar.eval.run_files import flat, read_numbers, read_settings

_PANELS = (
    Panel("loss", "Loss"),
    Panel("val_top1", "Top-1 on data.val, %"),
    Panel("train_top1", "Top-1 on the training views, %", None, "mixed images count as the larger part of the mix"),
    Panel("val_top5", "Top-5 on data.val, %"),
    Panel("lr", "Learning rate"),
    Panel("grad_norm", "Gradient norm"),
    Panel("img_per_s", "Images per second"),
)


def write_classification_report(run: Path, about: Mapping[str, Any] = {}) -> Path:
    """Write `report.html` in the folder of a supervised run from what is there, and return its path.

    about: what its weights record about themselves (`nearfar.ssl.checkpoint.about`), where they have been read.

    Raises:
        UserError: one of its files cannot be read, or the page cannot be written.
    """
    settings, metrics = read_settings(run), read_numbers(run / "metrics.jsonl")
    found = results.read(run / "results.json")
    scores = [score for score in found if score.task == "finetune"]
    score = max(scores, key=lambda each: each.step or 0) if scores else None
    name = str(settings.get("name") or run.resolve().name)
    drawn = "".join(curves(metrics, _PANELS))
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="lede">{html.escape(_summary(settings, score))}</p>',
        section("Curves", f'<div class="curves">{drawn}</div>' if drawn else missing("No step is logged yet.")),
        section("Classes", _classes(score)),
        *_frozen(found),
        views_section(run / "views.png", "The first batch as the loader made it, before mixing."),
        settings_section(settings),
        environment_section(about),
        lineage_section(settings, found, about),
    ]
    return write_page(run / "report.html", page(name, body))


def _summary(settings: Mapping[str, Any], score: Score | None) -> str:
    known = flat(settings)
    start = known.get("backbone.weights") or ("timm's weights" if known.get("backbone.pretrained") else "scratch")
    what = f"{known.get('backbone.name')}, trained with labels from {start} for {known.get('train.epochs')} epoch"
    what += "s" * (known.get("train.epochs") != 1)
    if score is None:
        return f"{what}. It is not scored: give labeled images as data.val."
    about = score.detail or {}
    five = f", top-5 {about['top5']:.1f} %" if isinstance(about.get("top5"), int | float) else ""
    names = about.get("classes")
    chance = f" (chance: {100 / len(names):.1f} %)" if isinstance(names, list) and names else ""
    return (
        f"{what} on {score.train.images:,} images: {score.percent:.1f} % of {score.val.images:,} images of "
        f"{score.val.path} right{chance}{five}, after step {score.step}."
    )


def _classes(score: Score | None) -> str:
    about = (score.detail or {}) if score else {}
    names, per_class = about.get("classes"), about.get("per_class")
    if not isinstance(names, list) or not isinstance(per_class, list):
        return missing("There is no score on labeled images yet.")
    rows = [
        (str(name), "no image" if share is None else f"{share:.1f} %")
        for name, share in zip(names, per_class, strict=False)
        if share is None or isinstance(share, int | float)
    ]
    matrix = confusion_matrix(about.get("confusion"), names)
    confusion = soft("Rows are true classes, columns answers, in percent of the row.") + matrix if matrix else ""
    return confusion + folded("Accuracy of each class", text_table(rows))


def _frozen(scores: Sequence[Score]) -> Iterator[str]:
    """What `nearfar eval` has scored of the backbone's features, where it has."""
    if any(score.task != "finetune" for score in scores):
        tables = list(results.tables(scores))
        yield scores_section(tables, scores)
        yield robustness_section(tables[0])
        yield position_section(tables[0])
