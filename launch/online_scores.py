"""What is told of the teacher while it learns: its k-NN, and how like its features are to those it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nearfar.eval.features import sharing
from nearfar.eval.features.extraction import Features, Reading, compute_share, digest, extract
from nearfar.eval.features.images import Decoding
from nearfar.eval.knn import knn
from nearfar.eval.scores.headline_scores import labels_of
from nearfar.eval.scores.tasks import label_numbers
from nearfar.launch.local.stop_signals import ScoringStoppedError
from nearfar.ssl import checkpoint
from nearfar.ssl.backbones import Backbone
from nearfar.ssl.data.sources.base import Source, Subset
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning.health import start_similarity
from nearfar.ssl.parallel import device, distributed
from nearfar.ssl.settings.defaults import ResolvedRun


class OnlineKNN:
    """20-NN accuracy of the teacher during training, on labeled validation images; `missing` says why there is none.

    Classes are matched by name where both have names: the validation images may be of some of the classes only.

    The memory is every m-th training image, so that it holds at most `images`, of all classes; the scored images
    are chosen alike. A stop signal ends it without a score (None): scoring may take minutes, and the sender of the
    signal waits only seconds.

    shared: all ranks of the run extract together, the others by `assist`, where all have the same images and weights.
    say: tells where they have not.
    """

    def __init__(
        self,
        source: Source,
        val: Source,
        images: int,
        should_stop: Callable[[], bool] = lambda: False,
        shared: bool = False,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.should_stop, self.shared, self._say, self._difference_said = should_stop, shared, say, False
        self.missing = _no_score(source, val)
        self.memory = Subset(source, np.arange(0, len(source), -(-len(source) // images)))
        self.val = Subset(val, np.arange(0, len(val), -(-len(val) // images)))

    def __call__(self, backbone: Backbone, run: ResolvedRun) -> dict[str, float] | None:
        shared = self.shared and self._alike(backbone)
        if self.missing:
            return {}
        found = self._score(backbone, run, shared)
        if shared:
            sharing.dismiss()
        return found

    def assist(self, backbone: Backbone, run: ResolvedRun) -> None:
        """On every other rank while the first one scores: extract a share of the images."""
        if self.shared and self._alike(backbone) and not self.missing:
            compute_share([backbone], [self.memory, self.val], Decoding(workers=run.data.workers))

    def _alike(self, backbone: Backbone) -> bool:
        """Has every rank the same images and weights, bit for bit? All must ask. Where not, the first scores alone."""
        mine = json.dumps([self.missing, self.memory.fingerprint, self.val.fingerprint, digest(backbone)])
        everyone = [json.loads(text) for text in distributed.gathered([mine])]
        if (alike := all(each == everyone[0] for each in everyone)) or self._difference_said:
            return alike
        what = "weights" if all(each[:3] == everyone[0][:3] for each in everyone) else "images"
        self._say(f"The ranks have different {what}, so the first one computes the online k-NN alone, of its own.")
        self._difference_said = True
        return False

    def _score(self, backbone: Backbone, run: ResolvedRun, shared: bool) -> dict[str, float] | None:
        def go_on(_: int) -> None:
            if self.should_stop():
                raise ScoringStoppedError

        def read(source: Source) -> Features:
            reading = Reading(run.eval.size, run.eval.resize, pooling=run.head.pooling, amp=compute.bf16)
            return extract(backbone, source, reading, Decoding(workers=run.data.workers, progress=go_on, shared=shared))

        compute = device.choose(run.train.device, run.train.precision, backbone.embed_dim)
        place = next(backbone.parameters()).device
        try:
            memory, val = read(self.memory), read(self.val)
            known, right = labels_of(memory, val)
            (score,) = knn(memory.x, known, val.x, right, ks=(20,), device=place).values()
        except ScoringStoppedError:
            return None
        return {"knn_top1": score}


def _no_score(train: Source, val: Source) -> str:
    """Why k-NN cannot tell the classes of one from images of the other; "" where it can."""
    if train.labels is None or val.labels is None:
        return "both need labels, which are class folders, or lists with a label after a tab."
    try:
        label_numbers(train.classes, val.classes)
    except UserError as error:
        return str(error)
    return ""


class StartSimilarity:
    """How like the features of the weights that a run began with the teacher's are, on a few training images, evenly
    spread; nothing for a run that began with random weights.
    """

    def __init__(self, source: Source, start: Path, images: int = 256) -> None:
        self.images = Subset(source, np.arange(0, len(source), -(-len(source) // images)))
        self.start = start
        self._features: np.ndarray | None = None

    def __call__(self, backbone: Backbone, run: ResolvedRun) -> dict[str, float]:
        if not self.start.is_file():
            return {}
        place = next(backbone.parameters()).device
        compute = device.choose(run.train.device, run.train.precision, backbone.embed_dim)
        reading = Reading(run.eval.size, run.eval.resize, pooling=run.head.pooling, amp=compute.bf16)

        def read(network: Backbone) -> np.ndarray:
            return np.asarray(extract(network, self.images, reading, Decoding(workers=run.data.workers)).x)

        if self._features is None:
            self._features = read(checkpoint.load(self.start).to(place))
        return {"start_similarity": start_similarity(read(backbone), self._features)}


class OnlineScores:
    """What is told of the teacher during training: k-NN where there are labels, and similarity to its start."""

    def __init__(self, score: OnlineKNN | None, similarity: StartSimilarity) -> None:
        self.score, self.similarity = score, similarity

    def __call__(self, backbone: Backbone, run: ResolvedRun) -> dict[str, float] | None:
        scores = self.score(backbone, run) if self.score else {}
        return None if scores is None else scores | self.similarity(backbone, run)
