"""The model card: what a folder holds, how good it is by results.json, and how it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from nearfar.eval import results
from nearfar.eval.features.extraction import digest
from nearfar.eval.results import SUBJECTS, TITLES, DataName, Score
from nearfar.launch.exports.exported import ExportedBackbone
from nearfar.ssl.backbones.tokens import one_line
from nearfar.ssl.data.transforms.normalize import MEAN, STD

SHOWN = (  # settings of the training that a reader wants first
    "train.epochs", "train.batch_size", "optim.lr", "views.global_crops_size", "views.local_crops_size",
    "views.local_crops_number", "head.prototypes", "loss.centering", "train.seed",
)  # fmt: skip


class TrainingKind(NamedTuple):
    """words: what the network is, after a comma. tags: of the hub."""

    words: str
    tags: tuple[str, ...]


class Preprocessing(NamedTuple):
    """How an image becomes the network's input: shorter side to `resize` (antialiased bicubic), central `crop`."""

    resize: int
    crop: int


def preprocessing_of(exported: ExportedBackbone) -> Preprocessing:
    """As the run evaluates, where its settings are known; else 256 / 224 of the size of the network."""
    crop = setting(exported, "eval.size") or setting(exported, "views.global_crops_size") or min(exported.size)
    crop = crop if isinstance(crop, int) and crop > 0 else min(exported.size)
    resize = setting(exported, "eval.resize")
    return Preprocessing(resize if isinstance(resize, int) and resize >= crop else round(crop * 256 / 224), crop)


def setting(exported: ExportedBackbone, key: str) -> Any:
    """A setting of the run as the weights record it; None where they do not."""
    node: Any = exported.about.get("run")
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def model_card(exported: ExportedBackbone, library: str) -> str:
    """README.md of a folder that `library` ("timm", "transformers" or "nearfar") loads.

    Raises UserError for a results.json that cannot be read.
    """
    name, numbers = one_line(str(exported.arch["name"]), 80), sum(p.numel() for p in exported.backbone.parameters())
    training = training_of(exported)
    ideas = f", with {' and '.join(exported.ideas)}" if exported.ideas else ""
    lines = [
        "---",
        yaml.safe_dump(_front(exported, library), sort_keys=False).strip(),
        "---",
        "",
        f"# {one_line(str(setting(exported, 'name') or name), 80)}",
        "",
        f"A {name}{ideas} ({numbers / 1e6:.1f} million parameters), {training.words}{_trained_on(exported)}. It gives "
        f"features and has no classifier.{_origin(exported)}",
        "",
        "## Scores of the frozen features",
        "",
        *_scores(exported),
        "",
        "## Use",
        "",
        "```python",
        *_use(library),
        "```",
        "",
        *_preprocessing(preprocessing_of(exported)),
        "",
        "## Training",
        "",
        *_settings(exported),
    ]
    return "\n".join(lines) + "\n"


def _front(exported: ExportedBackbone, library: str) -> dict[str, Any]:
    return {
        "license": exported.license,
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["nearfar", *training_of(exported).tags, *(idea.lower() for idea in exported.ideas)],
    }


def training_of(exported: ExportedBackbone) -> TrainingKind:
    """What kind of training the weights come from, by the settings that they record."""
    if setting(exported, "classifier") is not None:
        return TrainingKind("the backbone of a classifier that nearfar trained with labels", ("supervised",))
    if teacher := setting(exported, "distill.teacher"):
        of = one_line(PurePath(str(teacher)).name if not str(teacher).startswith("timm/") else str(teacher), 80)
        return TrainingKind(f"distilled by nearfar from a frozen teacher ({of}), without labels", ("distillation",))
    if setting(exported, "loss") is None:
        return TrainingKind("whose file does not say how it was trained", ())
    return TrainingKind("pretrained without labels by nearfar (DINO)", ("self-supervised-learning", "dino"))


def _origin(exported: ExportedBackbone) -> str:
    """A sentence on the weights that the training began with, if it did not begin from scratch."""
    lineage = exported.about.get("lineage")
    last = lineage[-1] if isinstance(lineage, list) and lineage and isinstance(lineage[-1], dict) else {}
    return f" It began with the weights of {_data_name(str(last['from']))}." if "from" in last else ""


def _trained_on(exported: ExportedBackbone) -> str:
    path, epochs, step = (setting(exported, "data.path"), setting(exported, "train.epochs"), exported.about.get("step"))
    on = f" on {_data_name(str(path))}" if path else ""
    return (
        on
        + (f" for {epochs} epoch{'s' * (epochs != 1)}" if epochs else "")
        + (f"; these are the weights of step {step}" if step else "")
    )


def _data_name(path: str) -> str:
    """The end of a path, since nobody else has its beginning: `imagenette/train`."""
    return one_line("/".join(PurePath(path).parts[-2:]).lstrip("/"), 80)


def own_scores(exported: ExportedBackbone) -> list[Score]:
    """The entries of results.json for exactly these weights, and the baselines beside them."""
    weights = digest(exported.backbone)
    return [score for score in results.read(exported.results) if score.subject != "trained" or score.weights == weights]


def _scores(exported: ExportedBackbone) -> Iterator[str]:
    scores = own_scores(exported)
    known = {score.data for score in scores if score.subject == "trained"}
    if not known:
        yield "These weights have not been scored."
        return
    yield "Percent, as `nearfar eval` measured them; untrained is the same network before its first step."
    for table in results.tables(score for score in scores if score.data in known):
        tasks = [task for task in TITLES if any(task in row for row in table.values())]
        first = next(iter(next(iter(table.values())).values()))
        yield from (
            "",
            f"Learned from {_named(first.train)}, scored on {_named(first.val)}:",
            "",
            f"| | {' | '.join(TITLES[task] for task in tasks)} |",
            f"|---|{'---|' * len(tasks)}",
        )
        for who, row in table.items():
            cells = [f"{row[task].percent:.1f}" if task in row else "-" for task in tasks]
            yield f"| {SUBJECTS[who]} | {' | '.join(cells)} |"


def _named(data: DataName) -> str:
    return f"{_data_name(data.path)} ({data.images:,} images)"


def _use(library: str) -> list[str]:
    if library == "timm":
        return [
            "import timm",
            "",
            'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()',
            "features = model(images)  # (B, 3, H, W) -> CLS (B, D)",
            "tokens = model.forward_features(images)  # (B, 1 + registers + h*w, D)",
        ]
    if library == "transformers":
        return [
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            'processor = AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")',
            'model = AutoModel.from_pretrained("PATH_OF_THIS_FOLDER").eval()',
            "tokens = model(**processor(images, return_tensors='pt')).last_hidden_state",
            "features = tokens[:, 0]  # CLS",
        ]
    return [
        "from nearfar.ssl.checkpoint import load",
        "",
        'backbone = load("PATH_OF_THIS_FOLDER/model.safetensors")  # architecture and weights from the file alone',
        "tokens = backbone(images)  # (B, 3, H, W) -> tokens.cls (B, D), tokens.patches (B, N, D)",
    ]


def _preprocessing(prepared: Preprocessing) -> list[str]:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (MEAN, STD))
    return [
        f"Preprocessing: shorter side to {prepared.resize} pixels (antialiased bicubic), central crop of "
        f"{prepared.crop} x {prepared.crop}, RGB from 0 to 1, minus the mean ({mean}), divided by the deviation "
        f"({std}).",
    ]


def _settings(exported: ExportedBackbone) -> Iterator[str]:
    known = {key: setting(exported, key) for key in SHOWN}
    known = {key: value for key, value in known.items() if value is not None}
    if not known:
        yield "The weights do not say how they were trained."
        return
    yield from ("| setting | value |", "|---|---|")
    yield from (f"| `{key}` | {one_line(str(value), 60)} |" for key, value in known.items())
    versions = exported.about.get("versions")
    if isinstance(versions, dict):
        yield ""
        listed = ", ".join(f"{one_line(str(key), 20)} {one_line(str(value), 30)}" for key, value in versions.items())
        yield f"Trained with {listed}."
