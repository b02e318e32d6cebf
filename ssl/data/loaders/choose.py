"""Which loader a run takes: pillow (any source), ffcv (compiled loops over a .beton), device (all images in memory)."""

from typing import Literal

import torch

from nearfar.ssl.data import libjpeg
from nearfar.ssl.data.loaders.base import Loader, LoaderOptions
from nearfar.ssl.data.loaders.pillow import PillowLoader
from nearfar.ssl.data.sources.base import Source
from nearfar.ssl.data.sources.beton import BetonSource
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.run import ViewSettings


def open_loader(
    source: Source,
    views: ViewSettings,
    options: LoaderOptions,
    *,
    loader: Literal["auto", "ffcv", "pillow", "device"] = "auto",
    color: Literal["device", "loader"] = "device",
    device: torch.device | None = None,
) -> Loader:
    """The loader of `data.loader`; its `title` says which that is. Views and order are the same in all.

    `auto` is ffcv for a .beton where FFCV is installed, else pillow. Raises UserError for a loader that the source or
    `color` does not fit.
    """
    if loader == "auto":
        loader = "ffcv" if isinstance(source, BetonSource) and libjpeg.available() else "pillow"
    if color == "loader" and loader != "ffcv":
        raise UserError(
            f"data.color_on=loader needs the ffcv loader, and this run has the {loader} loader: data.path must be a "
            ".beton (nearfar data beton SRC OUT.beton) and FFCV installed. Or leave data.color_on=device."
        )
    if loader == "ffcv":
        from nearfar.ssl.data.loaders.ffcv import FFCVLoader

        if not isinstance(source, BetonSource):
            raise UserError(
                "data.loader=ffcv reads a .beton, and data.path is not one. Write it: nearfar data beton SRC OUT.beton."
            )
        return FFCVLoader(source, views, options, colored=color == "loader")
    if loader == "device":
        from nearfar.ssl.data.loaders.device import DeviceLoader

        return DeviceLoader(source, views, options, device=device or torch.device("cpu"))
    return PillowLoader(source, views, options)
