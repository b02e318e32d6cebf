"""The pictures of a run: what its weights make of its images, drawn into figures.json for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from nearfar.eval import results
from nearfar.eval.features.extraction import Features, Reading, extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.features.pixels import pixel_features
from nearfar.eval.neighbors import neighbors
from nearfar.eval.pictures.attention_maps import MASS, OFFSET_LOCAL, attention_maps, heated, holding, looks, spotlight
from nearfar.eval.pictures.figures import Cell, Figure, Group, encoded
from nearfar.eval.pictures.sheets import mask_color, mask_group, mask_names, neighbor_groups, same_class
from nearfar.eval.pictures.token_colors import painted, patch_tokens, similarity, token_colors
from nearfar.eval.results import Score
from nearfar.eval.scores.evaluation import sides
from nearfar.eval.scores.headline_scores import PIXEL_SIDE, native_grid
from nearfar.eval.scores.tasks import mask_class_names
from nearfar.eval.segmentation import ProbeTraining, predict_masks
from nearfar.launch.computing import compute_for
from nearfar.launch.scoring.score import Subject, protocol_of
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data import open_source
from nearfar.ssl.data.labels import class_descriptions
from nearfar.ssl.data.sources.base import Source, spread
from nearfar.ssl.data.transforms.eval_view import eval_view
from nearfar.ssl.data.transforms.normalize import normalize_pixels
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.patches import whole_patches

SHOWN = 6  # images of each figure
NEIGHBORS = 8
MEMORY, QUERIES = 2000, 200  # images among which neighbors are looked for, and of which the share of right ones is told
MASKED = 1000  # images that train the head of the predicted masks
MASK_WORK = 600_000  # its steps times the cells of a grid, ten times that for the mlp: half a minute on one thread
TOGETHER = (
    26  # images of one principal component analysis; every fifth is shown, which makes them those of the attention
)
LARGE = 480  # pixels of the picture under an attention map


class FigureInputs(NamedTuple):
    """Images of a run and weights to look at them with. val: labeled or not; may be the training images themselves."""

    subject: Subject
    train: Source
    val: Source
    scores: list[Score]


def draw_figures(run: Path, subject: Subject | None = None) -> list[Figure]:
    """All figures of a run, best first; one that cannot be drawn says why.

    Raises:
        UserError: no weights, or no images that can be read.
    """
    if subject is None:
        subject = Subject.of(run)
        subject = subject.on(compute_for(subject.backbone, "auto"))
    data = subject.run.data
    if not data.path:
        raise UserError("The run does not say which images it was trained on (data.path), so there is nothing to show.")
    train = open_source(data.path)
    val = open_source(data.val) if data.val else train
    pictured = FigureInputs(subject, train, val, results.read(run / "results.json"))
    drawers: tuple[tuple[str, str, Callable[[FigureInputs], Figure]], ...] = (
        ("neighbors", "Nearest neighbors", _neighbors),
        ("masks", "Predicted masks", _masks),
        ("attention", "Attention", _attention),
        ("tokens", "Patch tokens", _tokens),
        ("layers", "Layers", _layers),
    )
    figures = []
    for key, title, draw in drawers:
        try:
            figures.append(draw(pictured))
        except UserError as error:
            figures.append(Figure(key, title, missing=str(error)))
    return figures


def _neighbors(pictured: FigureInputs) -> Figure:
    itself = pictured.val is pictured.train
    subject, val = pictured.subject, spread(pictured.val, MEMORY if itself else QUERIES)
    memory = val if itself else spread(pictured.train, MEMORY)
    reading = protocol_of(subject).pooled
    found, rows = {}, None
    kinds: dict[str, Callable[[Source], Features]] = {
        "trained": lambda source: extract(subject.backbone, source, reading, Decoding()),
        "raw pixels": lambda source: pixel_features(source, PIXEL_SIDE),
    }
    for kind, features in kinds.items():
        known = features(memory)
        queries = known if itself else features(val)
        k = min(NEIGHBORS, len(known.x) - itself)
        if k < 1:
            raise UserError("There are too few images to have neighbors.")
        _, near = neighbors(known.x, queries.x, k, leave_one_out=itself)
        found[kind], rows = known.index[near.numpy()], queries.index
    assert rows is not None  # both kinds read the same images
    share = {kind: same_class((val, rows.tolist()), memory, near) for kind, near in found.items()}
    chosen = _spread_rows(val, rows)
    shown = {kind: near[chosen] for kind, near in found.items()}
    groups = neighbor_groups((val, rows[chosen].tolist()), memory, shown, _descriptions(subject))
    text = (
        f"A query and the {NEIGHBORS} images nearest to it among {len(memory):,}, by trained features and by raw "
        f"pixels. Queries are evenly spread over the {'images' if itself else 'test images'}, not picked."
    )
    if share["trained"] is not None:
        text += (
            f" A check mark is an image of the query's class, a cross one of another: over {len(rows):,} queries "
            f"{share['trained']:.0f} % of the neighbors are right by trained features, {share['raw pixels']:.0f} % by "
            "raw pixels."
        )
    return Figure("neighbors", "Nearest neighbors", text, groups)


def _descriptions(subject: Subject) -> dict[str, str]:
    """Of the classes of a run's images; a .beton may hold the folders' names, and only the test images a list."""
    paths = [path for path in (subject.run.data.path, subject.run.data.val) if path]
    return {name: text for path in paths for name, text in class_descriptions(path).items()}


def _masks(pictured: FigureInputs) -> Figure:
    title = "Predicted masks"
    score = next((s for s in reversed(pictured.scores) if (s.subject, s.task) == ("trained", "segment")), None)
    if score is None:
        raise UserError("Segmentation is not scored: `nearfar eval segment` needs images with masks.")
    train, val = open_source(score.train.path), open_source(score.val.path)
    classes = (score.detail or {}).get("classes")
    if not isinstance(classes, int):
        raise UserError("The segmentation score does not say how many classes there are.")
    subject, scored = pictured.subject, score.reading
    patch = subject.backbone.patch_size
    height, width = sides(scored["size"]) if scored.get("size") else native_grid(train, patch)
    size = whole_patches(height, patch), whole_patches(width, patch)  # crops and windows may be of any size
    reading = Reading(size, layer=str(scored["layer"]), pooling="grid", amp=subject.amp)
    few = Decoding(batch_size=8)
    grids = [
        extract(subject.backbone, spread(source, n), reading, few) for source, n in ((train, MASKED), (val, SHOWN))
    ]
    training = picture_head(scored, grids[0].x.shape[1] * grids[0].x.shape[2])
    truth = grids[1].mask_list()
    predicted = predict_masks(
        (grids[0].x, grids[0].mask_list()), (grids[1].x, [mask.shape for mask in truth]), classes, training,
        device=subject.device,
    )  # fmt: skip
    names, test = mask_names(classes, mask_class_names(train, score.train.path)), spread(val, SHOWN)
    groups = tuple(
        mask_group(test.read(int(i)), mask, found, names)
        for i, mask, found in zip(grids[1].index, truth, predicted, strict=True)
    )
    used = sorted({int(n) for mask in [*truth, *predicted] for n in np.unique(mask) if n < classes})
    legend = tuple((names[number], mask_color(number, names)) for number in used)
    text = (
        f"Test images, evenly spread, with their masks and what a head on the frozen patch tokens makes of "
        f"them; for this picture a head ({training.head}) learned from {len(grids[0].x):,} images in "
        f"{training.steps_taken:,} steps. "
        f"Over all {score.val.images:,} test images of {score.val.path} the score is {score.percent:.1f} % mIoU "
        f"(head: {scored.get('head', 'linear')})."
    )
    return Figure("masks", title, text, groups, legend, "medium", of=score.key)


def picture_head(scored: Mapping[str, Any], cells: int) -> ProbeTraining:
    """The head that draws the predicted masks on grids of so many cells: the scored kind, for as long as a picture may.

    LocAt's head learns on crops for minutes; the linear one stands in for it.
    """
    locat = scored.get("head") == "locat"
    training = ProbeTraining() if locat else ProbeTraining(str(scored.get("head", "linear")), scored.get("steps"))
    work = cells * (10 if training.head == "mlp" else 1)
    return replace(training, steps=min(training.steps_taken, max(200, MASK_WORK // work)))


def _attention(pictured: FigureInputs) -> Figure:
    subject = pictured.subject
    views, maps = _enlarged(pictured, SHOWN, attention_maps)
    groups = []
    for view, values in zip(views, maps, strict=True):
        picture = _picture(view).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
        share = f"{100 * MASS:.0f} % of the attention on {100 * holding(values).mean():.0f} % of the picture"
        cells = (
            Cell(encoded(heated(picture, values)), "the image under a glow of attention", "more than an even share"),
            Cell(encoded(spotlight(picture, values)), "the most attended part of the image, in color", share),
        )
        groups.append(Group((("", cells),)))
    text = (
        "What CLS attends to in the last block, the mean over its heads. Left a glow where attention exceeds an even "
        f"share; right in color the least part of the picture that holds {100 * MASS:.0f} % of it, the rest dimmed "
        f"(evenly spread attention would need {100 * MASS:.0f} %). Seen at {views.shape[-1]} pixels, "
        f"{maps.shape[1]}x{maps.shape[2]} patches; trained on views of "
        f"{subject.run.views.global_crops_size}."
    )
    return Figure("attention", "Attention", text, tuple(groups), size="medium")


def _tokens(pictured: FigureInputs) -> Figure:
    views, tokens = _enlarged(pictured, TOGETHER, patch_tokens)
    found = token_colors(tokens)
    chosen = np.linspace(0, len(views) - 1, min(SHOWN, len(views))).astype(int)
    groups = tuple(_token_group(views[i], tokens[i], found.colors[i], found.shown[i]) for i in chosen)
    text = (
        "Left the image; in the middle the first three principal components of its patch tokens as red, green and "
        f"blue, one analysis over {len(views)} images, so that alike colors are alike tokens; patches like those along "
        "the border of their image are left out as background. Right how alike each place is to the marked one. "
        f"{tokens.shape[1]}x{tokens.shape[2]} patches, at {views.shape[-1]} pixels."
    )
    return Figure("tokens", "Patch tokens", text, groups, size="medium")


def _layers(pictured: FigureInputs) -> Figure:
    subject = pictured.subject
    views = readable_views(pictured.val, subject.image_size, TOGETHER)
    found = looks(subject.backbone, on_device(views, subject))
    points = tuple((number, distance) for number, layer in enumerate(found, 1) for distance in layer.distance)
    gaug = any(layer.std for layer in found)
    heads = ["layer", "attention distance, pixels", "most at one offset", "offset-local heads"]
    table = [tuple(heads + ["GAug std, patches (down x across)", "GAug strength"] * gaug)]
    for number, layer in enumerate(found, 1):
        share = max(layer.offset_share)
        down, across = layer.offset[layer.offset_share.index(share)]
        local = sum(each >= OFFSET_LOCAL for each in layer.offset_share)
        row = [str(number), f"{np.mean(layer.distance):.1f}", f"{100 * share:.0f} % at ({down:+d}, {across:+d})"]
        row.append(f"{local} of {len(layer.offset_share)}")
        if gaug:
            row.append(f"{layer.std[0]:.2f} x {layer.std[1]:.2f}" if layer.std else "")
            row.append("" if layer.strength is None else f"{layer.strength:.2f}")
        table.append(tuple(row))
    text = (
        f"How far each head (a dot) looks on average from a patch, over {len(views)} images of {views.shape[-1]} "
        f"pixels. A head is offset-local where one fixed offset (rows, columns) gets at least {100 * OFFSET_LOCAL:.0f} "
        "% of a patch's attention to patches."
    )
    if gaug:
        text += " GAug: the mean standard deviation that queries ask for, and the bias on themselves."
    return Figure("layers", "Layers", text, points=points, axes=("layer", "distance, pixels"), table=tuple(table))


def _enlarged(
    pictured: FigureInputs, count: int, compute: Callable[[Backbone, torch.Tensor], np.ndarray]
) -> tuple[torch.Tensor, np.ndarray]:
    """Views (n, 3, S, S) of images, several times as large as in training where the network takes such, and what is
    computed of them."""
    subject = pictured.subject
    patch = subject.backbone.patch_size
    native = -(-subject.image_size // patch) * patch
    larger = max(native, min(4 * subject.image_size, LARGE) // patch * patch)
    for side in dict.fromkeys((larger, native)):
        views = readable_views(pictured.val, side, count)
        try:
            found = [compute(subject.backbone, part) for part in on_device(views, subject).split(8)]
        except UserError:
            if side == native:
                raise
            continue
        break
    return views, np.concatenate(found)


def _token_group(
    view: torch.Tensor, tokens: np.ndarray, colors: np.ndarray, shown: np.ndarray, side: int = 240
) -> Group:
    picture = _picture(view).resize((side, side), Image.Resampling.BICUBIC)
    rows, columns = np.nonzero(shown if shown.any() else np.ones_like(shown))
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    position = int(rows[nearest]), int(columns[nearest])
    alike = similarity(tokens, position)
    heat = heat_map(alike.clip(0), (side, side))
    step = side / len(tokens)
    marked = Image.fromarray(_cross(np.array(heat), ((position[0] + 0.5) * step, (position[1] + 0.5) * step)))
    return Group(
        (
            (
                "",
                (
                    Cell(encoded(picture), "the image"),
                    Cell(encoded(painted(colors, shown, (side, side))), "principal components of its patch tokens"),
                    Cell(encoded(marked, exact=True), "similarity of its patch tokens to the marked one"),
                ),
            ),
        )
    )


def heat_map(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Values (h, w) from 0 to 1 as colors, smoothly enlarged."""
    from matplotlib import colormaps

    large = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    return Image.fromarray((colormaps["magma"](large)[..., :3] * 255 + 0.5).astype(np.uint8))


def _cross(pixels: np.ndarray, at: tuple[float, float], arm: int = 9) -> np.ndarray:
    y, x = int(at[0]), int(at[1])
    for width, color in ((2, (0, 0, 0)), (1, (255, 255, 255))):
        pixels[max(0, y - arm) : y + arm + 1, max(0, x - width) : x + width + 1] = color
        pixels[max(0, y - width) : y + width + 1, max(0, x - arm) : x + arm + 1] = color
    return pixels


# --- images ----------------------------------------------------------------------------------------------------


def readable_views(source: Source, size: int, most: int) -> torch.Tensor:
    """Readable images evenly spread over the source, cropped to a square: uint8 (n, 3, size, size).

    Raises UserError where none of them can be read.
    """
    views, reason, n = dict[int, torch.Tensor](), "", len(source)
    for i in np.linspace(0, n - 1, min(most, n)).astype(int).tolist():
        for j in range(i, min(i + 10, n)):  # a damaged image: the next one
            if j in views:
                continue
            try:
                views[j] = torch.as_tensor(eval_view(source.read(j), size, size))
            except BadImage as error:
                reason = f" {error}"
                continue
            break
    if not views:
        raise UserError(f"No image of the run could be read.{reason}")
    return torch.stack(list(views.values()))


def on_device(views: torch.Tensor, subject: Subject) -> torch.Tensor:
    return normalize_pixels(views).to(subject.device)


def _picture(view: torch.Tensor) -> Image.Image:
    return Image.fromarray(view.permute(1, 2, 0).numpy())


def _spread_rows(source: Source, rows: Iterable[int]) -> list[int]:
    """Positions in `rows` of a few images, of different classes where there are labels, in their order."""
    order = list(rows)
    if source.labels is None:
        return np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int).tolist()
    first: dict[int, int] = {}
    for at, i in enumerate(order):
        first.setdefault(int(source.labels[i]), at)
    places = list(first.values())
    return [places[at] for at in np.linspace(0, len(places) - 1, min(SHOWN, len(places))).astype(int)]
