"""What all loaders share: the order of a run's batches, the replacement of bad images, and when those are too many."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.ssl.data.decode import size_problem
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.views import ViewPlan, epoch_order
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.settings.run import ViewSettings
from nearfar.ssl.wording import counted


@dataclass
class Batch:
    """The geometric views of B samples; color is still to be done, by `colors.color_views` with `plan`."""

    groups: list[Tensor]  # uint8 (G, B, 3, s, s) global views, and (V - G, B, 3, s, s) local ones if there are any
    plan: ViewPlan
    index: NDArray[np.int64]  # (B,) the samples, after unreadable ones were replaced
    label: NDArray[np.int64] | None  # (B,)
    epoch: int
    step: int  # within the epoch
    bad: list[tuple[str, str]] = field(default_factory=list)  # name and reason of each unreadable image met
    decoded: int = 0
    colored: bool = False  # whether the loader did the color as well; then `color_views` does not

    @property
    def views(self) -> list[Tensor]:
        """All V views, uint8 (B, 3, s, s) each."""
        return [view for group in self.groups for view in group]

    def pin_memory(self) -> "Batch":
        """What DataLoader calls where there is a GPU: views in memory that can be copied to it in the background."""
        return replace(self, groups=[group.pin_memory() for group in self.groups])


@dataclass(frozen=True)
class Task:
    """The samples of one batch, and which batch it is."""

    epoch: int
    step: int
    index: NDArray[np.int64]


@dataclass(frozen=True)
class LoaderOptions:
    """How a loader orders and reads the images, whatever the views."""

    batch_size: int  # images a step on this rank
    epochs: int
    seed: int = 0
    workers: int = 0  # processes or threads beside the caller's; the batches do not depend on them
    rank: int = 0
    world_size: int = 1
    max_bad_fraction: float = 0.01
    min_side: int = 8  # pixels; an image with a shorter side is bad


@dataclass(frozen=True)
class BatchSamples:
    """Which samples a batch is made of, after bad images were replaced."""

    index: NDArray[np.int64]  # (B,)
    bad: list[tuple[str, str]]  # name and reason of each bad image met
    complete: bool  # False where so many are bad that the run will end


class Loader(ABC):
    """All batches of a run, from the seek position on, as one stream: workers stay alive between epochs.

    Global batch g of an epoch is samples [g*B*world_size, (g+1)*B*world_size) of `epoch_order`, of which rank r
    takes its r-th slice of B; an incomplete last batch is dropped. The result does not depend on `workers`.

    A bad image (unreadable, or with a side below `min_side`) is replaced by the next good one, in the cyclic order of
    the source, with the views of that one; its name is in `Batch.bad` and in `bad`. A UserError ends the run when more
    than `max_bad_fraction` of the images seen so far are bad, and they are at least 20, or a quarter of a smaller
    source (with 0, at the first); and when there is not enough memory.
    """

    title: ClassVar[str]  # its name in the first lines of a run's log

    def __init__(self, source: Source, views: ViewSettings, options: LoaderOptions) -> None:
        self.source, self.views, self.options = source, views, options
        whole_batch = options.batch_size * options.world_size
        self.steps_per_epoch = len(source) // whole_batch
        if self.steps_per_epoch == 0:
            alone = options.world_size == 1
            shares = "" if alone else f" ({options.batch_size} on each of {options.world_size} processes)"
            raise UserError(
                f"{counted(len(source), 'image')} cannot fill one batch of {whole_batch}{shares}. Choose a smaller "
                "batch size, or give more images."
            )
        self.decoded = 0
        self.bad: dict[str, str] = {}
        self._seen = np.zeros(len(source), bool)
        self._start = (0, 0)
        # fewer bad images than this never end a run; with max_bad_fraction = 0 the first one does
        self._always_allowed = min(20, math.ceil(len(source) / 4)) if options.max_bad_fraction else 1

    @abstractmethod
    def assemble(self, task: Task) -> Batch:
        """Make a batch, in any process or thread: `take` the images, then render them. No groups where it fails."""

    def batches(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        """The batches of tasks, in their order; here one after the other, in this process."""
        return map(self.assemble, tasks)

    def seek(self, epoch: int, step: int) -> None:
        """Let the next iteration begin with this step of this epoch."""
        epochs = self.options.epochs
        if not (0 <= epoch <= epochs and 0 <= step < self.steps_per_epoch):
            raise ValueError(f"no step {step} of epoch {epoch} in {epochs} epochs of {self.steps_per_epoch} steps")
        self._start = (epoch, step)

    def __iter__(self) -> Iterator[Batch]:
        stream = self.batches(self.tasks())
        try:
            for batch in stream:
                yield self._checked(batch)
        except MemoryError as error:
            raise UserError(
                f"There is not enough memory to decode and crop images ({_first_line(error)}). Choose a "
                "smaller train.batch_size or fewer data.workers, or shrink the images once: nearfar data beton."
            ) from error
        finally:
            if isinstance(stream, Generator):
                stream.close()  # ends workers

    def tasks(self) -> Iterator[Task]:
        """The tasks of this rank, from the seek position to the last epoch."""
        options, (first, step) = self.options, self._start
        for epoch in range(first, options.epochs):
            order = epoch_order(options.seed, epoch, len(self.source))
            for s in range(step if epoch == first else 0, self.steps_per_epoch):
                begin = (s * options.world_size + options.rank) * options.batch_size
                yield Task(epoch, s, order[begin : begin + options.batch_size])

    def take(self, requested: NDArray[np.int64], use: Callable[[int, int], None]) -> BatchSamples:
        """Call `use(k, i)` for sample i as the k-th of the batch; if it raises BadImage, for the next sample instead.

        That is the first of the samples requested, requested + 1, ... (cyclic) that can be used.
        """
        n, index, bad = len(self.source), requested.copy(), dict[str, str]()
        too_many = max(self._always_allowed, int(self.options.max_bad_fraction * n) + 1)
        for k, first in enumerate(requested.tolist()):
            for i in ((first + ahead) % n for ahead in range(n)):
                try:
                    use(k, i)
                except BadImage as error:
                    bad[error.name] = error.why
                    if len(bad) >= too_many:
                        return BatchSamples(index, list(bad.items()), complete=False)
                else:
                    index[k] = i
                    break
            else:
                return BatchSamples(index, list(bad.items()), complete=False)
        return BatchSamples(index, list(bad.items()), complete=True)

    def check_size(self, i: int, height: int, width: int) -> None:
        """Raises BadImage for an image of a size, in pixels, that cannot be used."""
        if why := size_problem(height, width, self.options.min_side):
            raise BadImage(self.source.name(i), why)

    def batch(self, task: Task, taken: BatchSamples, groups: list[Tensor], plan: ViewPlan, decoded: int = 0) -> Batch:
        """The batch of these views."""
        labels = self.source.labels
        label = None if labels is None or not groups else labels[taken.index]
        return Batch(groups, plan, taken.index, label, task.epoch, task.step, taken.bad, decoded)

    def _checked(self, batch: Batch) -> Batch:
        self.decoded += batch.decoded
        self.bad.update(batch.bad)
        self._seen[batch.index] = True
        seen = int(self._seen.sum()) + len(self.bad)
        if not batch.groups or (
            len(self.bad) >= self._always_allowed and len(self.bad) > self.options.max_bad_fraction * seen
        ):
            some = "; ".join(f"{name}: {why}" for name, why in list(self.bad.items())[:5])
            raise UserError(
                f"{len(self.bad)} of the {seen} images read so far cannot be used, more than "
                f"data.max_bad_fraction = {self.options.max_bad_fraction} allows. "
                f"{'Some of them' if len(self.bad) > 5 else 'They are'}: {some}. "
                "Allow a larger share, or repair or remove them (a run that has saved a checkpoint keeps its images: "
                "then choose another name=)."
            )
        return batch


def _first_line(error: BaseException) -> str:
    """The message without the stack that DataLoader adds to an error of a worker."""
    return (str(error).splitlines() or ["an allocation failed"])[0]
