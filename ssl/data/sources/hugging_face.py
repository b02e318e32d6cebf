"""Hugging Face data sets, read row by row in any order."""

import json
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearfar.ssl.data.decode import decode, upright
from nearfar.ssl.data.sources.base import class_numbers, sampled_images
from nearfar.ssl.disk import digests
from nearfar.ssl.errors import BadImage, UserError
from nearfar.ssl.wording import printable


class HuggingFaceSource:
    """A `datasets.Dataset` (or anything with rows by number, columns by name and `features` alike).

    Images are a column of the kind `datasets.Image`: read as bytes where `datasets` is installed, else as the Pillow
    images that rows hold. Class names come from `features[label].names`. A streamed data set has no length, so
    that a restart could not keep its order: UserError.
    """

    def __init__(self, dataset: Any, image: str = "image", label: str = "label", name: str = "a data set") -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(f"{name} is streamed: rows by number are needed. Load it without streaming=True.")
        columns = list(dataset.features)
        if image not in columns:
            raise UserError(f"{name} has no column '{image}'; its columns are: {', '.join(columns)}.")
        self.file, self._image = name, image
        self.labels: NDArray[np.int64] | None = None
        self.classes: list[str] | None = None
        if label in columns:
            self.labels = class_numbers(list(dataset[label]), len(dataset))
            names = getattr(dataset.features[label], "names", None) or []
            self.classes = [printable(str(name)) for name in names] or None
        self._dataset = _as_bytes(dataset, image)

    def __len__(self) -> int:
        return len(self._dataset)

    def _cell(self, i: int) -> Any:
        try:
            return self._dataset[int(i)][self._image]
        except MemoryError:
            raise
        except Exception as error:  # rows that hold images are decoded here, by any decoder
            raise BadImage(self.name(i), str(error) or type(error).__name__) from error

    def encoded(self, i: int) -> bytes | None:
        cell = self._cell(i)
        if not isinstance(cell, dict):
            return None
        if cell.get("bytes") is None:
            try:
                return Path(cell["path"]).read_bytes()
            except (OSError, TypeError) as error:
                raise BadImage(self.name(i), str(error)) from error
        return bytes(cell["bytes"])

    def read(self, i: int) -> Image.Image:
        cell = self._cell(i)
        if isinstance(cell, dict):
            return decode(BytesIO(self.encoded(i) or b""), self.name(i))
        if not isinstance(cell, Image.Image):
            raise BadImage(self.name(i), f"the column '{self._image}' holds {type(cell).__name__}, not an image")
        return upright(cell, self.name(i))

    def name(self, i: int) -> str:
        return f"{self.file}[{i}]"

    def mask(self, i: int) -> NDArray[np.uint8] | None:
        return None

    @cached_property
    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        some = [self.encoded(i) or self.read(i).tobytes() for i in sampled_images(len(self))]
        return digests.fingerprint([str(len(self)).encode(), labels, *some])


def _as_bytes(dataset: Any, column: str) -> Any:
    """The data set with its images undecoded, where `datasets` is installed and it is one of its own."""
    if not hasattr(dataset, "cast_column"):
        return dataset
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False))


def open_hugging_face(folder: Path) -> HuggingFaceSource:
    """A data set that `Dataset.save_to_disk` wrote. Raises UserError where the package `datasets` is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{folder} is a data set of Hugging Face's `datasets`, which is not installed: pip install datasets."
        ) from None
    try:
        dataset = datasets.load_from_disk(str(folder))
    except MemoryError:
        raise
    except Exception as error:  # pyarrow, fsspec and json each have their own
        raise UserError(f"{folder} cannot be read as a data set of Hugging Face's: {error}.") from error
    return HuggingFaceSource(dataset, name=printable(folder.name))


def is_hugging_face(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and "_data_files" in state
