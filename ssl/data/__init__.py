"""Images -> batches of views: sources, the plan of a view, transforms and loaders. Start with its two functions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfar.ssl.data.loaders.choose import open_loader
    from nearfar.ssl.data.sources.choose import open_source

__all__ = ["open_loader", "open_source"]


def __getattr__(name: str) -> Any:
    """Each when it is asked for: a loader needs torch, a source numpy, and a wrong path neither."""
    if name == "open_source":
        from nearfar.ssl.data.sources.choose import open_source

        return open_source
    if name == "open_loader":
        from nearfar.ssl.data.loaders.choose import open_loader

        return open_loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
