"""`nearfar eval`: its flags, which evaluator each is for, and what it does.

Nothing here imports torch, numpy or what needs them before the verb runs.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nearfar.eval.results import TASKS
from nearfar.launch.verbs.command_line import add_model, add_reading
from nearfar.ssl.errors import UserError

if TYPE_CHECKING:
    from nearfar.ssl.backbones import Backbone

_DESCRIPTION = """\
Score frozen features. Scores are added to results.json; none is ever removed.

with labels (class folders, or a list with a label after a tab):
  knn         weighted k-NN, k = 10 to 200
  whitened    k-NN of features whose directions all count alike: what the few strongest ones hide
  linear      linear probe; --augment trains it on random views, as DINO does
  logistic    logistic regression solved by L-BFGS: a cross-check of the linear probe
  fewshot     1, 5 and 10 labeled images a class, 1 % and 10 % of the labels; 5 draws each
  robustness  k-NN of shuffled patches, tokens and LGP bands, other sizes, flips and blur: what each costs
with masks (see below):
  segment     a head on frozen patch tokens; --head locat is LocAt's, trained on crops, flips and scales
  retrieval   dense retrieval: patches labeled by their nearest neighbors, no training
with any images:
  position    R2 of a linear map from patch tokens to their row and column

all = knn, linear, logistic, fewshot and segment, as far as the images allow: what reads the same features.

Masks are 8-bit PNGs of class numbers from 0, 255 = ignore, in a folder `masks` beside `images`, with the images' names;
or a split of a known data set: VOC2012/ImageSets/Segmentation/train.txt, ADEChallengeData2016/images/training,
coco/train2017 beside coco/stuffthingmaps.
"""
_ONLY = {  # flags that mean something to some evaluators only
    "augment": ("linear",),
    "epochs": ("linear", "all"),
    "head": ("segment", "all"),
    "steps": ("segment", "all"),
    "window": ("segment",),
    "stride": ("segment",),
    "memory": ("retrieval",),
    "pooling": ("all", "knn", "whitened", "linear", "logistic", "fewshot", "robustness"),
    "classes": ("segment", "retrieval", "all"),
    "grid_size": ("segment", "retrieval", "all"),
}
_POOLINGS = ("cls", "mean", "cls+mean")  # one vector an image
_NOT_OF_FEATURES = ("augment", "window", "stride", "grid_size", "pooling")  # these need the images again


def add_eval(verbs: argparse._SubParsersAction) -> None:
    """Put `eval` among the verbs of the `nearfar` command."""
    evaluate = verbs.add_parser(
        "eval",
        help=f"score frozen features: {', '.join(TASKS)}, or all that is cheap and the images allow",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("what", choices=[*TASKS, "all"], metavar="WHAT", help=f"{', '.join(TASKS)}, or all")
    add_model(evaluate, ", or features to learn from, as `nearfar features` writes them")
    evaluate.add_argument("--train", help="images to learn from (default: data.path of the run)")
    evaluate.add_argument("--val", help="images, or features, to score (default: data.val of the run)")
    evaluate.add_argument(
        "--baselines", action="store_true", help="also score starting weights, untrained network and raw pixels"
    )
    evaluate.add_argument("--out", type=Path, help="results file (default: results.json beside the weights)")
    evaluate.add_argument(
        "--augment", action="store_true", default=None,
        help="linear: train on random resized crops and flips, each through the network anew (slow)",
    )  # fmt: skip
    evaluate.add_argument(
        "--pooling",
        help="what stands for an image: cls, mean (of the patches) or cls+mean (default: head.pooling of the run); for "
        "`eval linear` also several, as in cls,mean, of which held-out training images choose one",
    )
    evaluate.add_argument("--epochs", type=int, help="linear: of the probe's training (default 100)")
    _add_dense(evaluate)
    add_reading(evaluate)
    evaluate.set_defaults(verb=run_eval)


def _add_dense(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--head", choices=["linear", "mlp", "locat"],
        help="segment: head of the probe (default linear); locat: an mlp trained on crops, flips and scales",
    )  # fmt: skip
    evaluate.add_argument(
        "--steps", type=int, help="segment: of the head's training (default 2000; mlp 500; locat 20000, for a GPU)"
    )
    evaluate.add_argument(
        "--window", type=int, metavar="PIXELS",
        help="segment: score test images at their own sizes by windows of this side, logits averaged where they "
        "overlap; 0: each image whole (default: images resized to one size; for locat, which trains on crops of this "
        "side: 512, or the shorter side of the first image if that is less)",
    )  # fmt: skip
    evaluate.add_argument(
        "--stride", type=int, metavar="PIXELS", help="segment: from one window to the next (default: 2/3 of it)"
    )
    evaluate.add_argument(
        "--memory", type=int, metavar="PATCHES", help="retrieval: training patches to search in (default 102400)"
    )
    evaluate.add_argument(
        "--classes", type=int,
        help="number of mask classes (default: as the data set or a classes.txt beside `images` says, or what masks "
        "hold)",
    )  # fmt: skip
    evaluate.add_argument(
        "--grid-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="segment, retrieval: size of the whole image in pixels (default: that of the first image)",
    )  # fmt: skip


def run_eval(arguments: argparse.Namespace) -> None:
    from nearfar.eval.features.store import is_store

    refuse_idle_flags(arguments)
    tasks = None if arguments.what == "all" else (arguments.what,)
    if is_store(arguments.model):
        _eval_features(arguments, tasks)
    else:
        _eval_model(arguments, tasks)


def refuse_idle_flags(arguments: argparse.Namespace) -> None:
    """Raises UserError for a flag that this evaluator would not read, and for numbers without sense."""
    for flag, tasks in _ONLY.items():
        if getattr(arguments, flag) is not None and arguments.what not in tasks:
            named = ", ".join(f"`eval {task}`" for task in tasks)
            raise UserError(f"--{flag.replace('_', '-')} is for {named}; `eval {arguments.what}` does not read it.")
    for flag in ("epochs", "steps", "memory", "stride", "classes"):
        if (number := getattr(arguments, flag)) is not None and number < 1:
            raise UserError(f"--{flag} must be at least 1, not {number}.")
    poolings = arguments.pooling.split(",") if arguments.pooling is not None else []
    if wrong := [pooling for pooling in poolings if pooling not in _POOLINGS]:
        raise UserError(f'--pooling takes {", ".join(_POOLINGS)}, not "{wrong[0]}".')
    if len(poolings) > 1 and arguments.what != "linear":
        raise UserError(f"--pooling takes several for `eval linear` alone; `eval {arguments.what}` reads one.")
    if arguments.stride is not None and arguments.window is None and arguments.head != "locat":
        raise UserError("--stride is the step of a sliding window: say --window too.")


def _eval_features(arguments: argparse.Namespace, tasks: tuple[str, ...] | None) -> None:
    from nearfar.launch.scoring.score_stores import score_features
    from nearfar.ssl.parallel.device import choose

    if not arguments.val:
        raise UserError(f"{arguments.model} holds features to learn from: name those to score with --val.")
    flags = [f"--{flag.replace('_', '-')}" for flag in _NOT_OF_FEATURES if getattr(arguments, flag) is not None]
    flags += ["--head locat"] if arguments.head == "locat" else []
    if flags:
        raise UserError(
            f"{arguments.model} holds features, and {', '.join(flags)} needs the images: name the weights and --train "
            "IMAGES --val IMAGES."
        )
    given = {key: getattr(arguments, key) for key in ("head", "steps", "memory", "epochs")}
    score_features(
        arguments.model, Path(arguments.val), tasks=tasks, file=arguments.out, console=Console(),
        device=choose(arguments.device, "fp32", 0, "--device ").device, classes=arguments.classes,
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip


def protocol_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the protocol: fields of `Reading` and `Protocol`, None where they say nothing."""
    keys = ("size", "resize", "head", "steps", "window", "stride", "memory", "augment", "epochs")
    given: dict[str, Any] = {key: getattr(arguments, key) for key in keys}
    if arguments.what == "linear":
        given["linear_layers"] = tuple(arguments.layer.split(",")) if arguments.layer else None
        given["linear_poolings"] = tuple(arguments.pooling.split(",")) if arguments.pooling else None
    else:
        given["pooling"] = arguments.pooling
        fields = {"segment": "grid_layer", "retrieval": "dense_layer", "position": "dense_layer"}
        given[fields.get(arguments.what, "layer")] = arguments.layer
    given["grid_size"] = tuple(arguments.grid_size) if arguments.grid_size else None
    return given


def _eval_model(arguments: argparse.Namespace, tasks: tuple[str, ...] | None) -> None:
    from nearfar.eval.features.images import Decoding
    from nearfar.launch.computing import by_all_ranks, compute_for
    from nearfar.launch.scoring.report import report_run
    from nearfar.launch.scoring.score import ScoreOptions, Subject, baselines, protocol_of, score, sources

    subject = Subject.of(arguments.model)
    train, val = sources(subject.run, arguments.train, arguments.val)
    given = protocol_flags(arguments)
    compute = compute_for(subject.backbone, arguments.device)

    def score_it(decoding: Decoding) -> None:
        placed = subject.on(compute)
        protocol = protocol_of(placed, **given)
        options = ScoreOptions(arguments.baselines, arguments.out, protocol, arguments.classes, decoding)
        reported = placed.is_run and not arguments.out
        try:
            score(placed, train, val, tasks=tasks, options=options, console=Console())
        except UserError:
            if reported:
                with contextlib.suppress(UserError):  # of the scores that there are; what went wrong first is told
                    report_run(placed.folder, placed)
            raise
        if reported:
            report_run(placed.folder, placed)

    def backbones() -> list[Backbone]:
        placed = subject.on(compute)
        return [placed.backbone, *(baselines(placed) if arguments.baselines else [])]

    images = [train.source, val.source]
    by_all_ranks(score_it, backbones, images, Decoding(workers=arguments.workers), arguments.device)
