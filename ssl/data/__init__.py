"""Images -> batches of views: sources, the plan of a view, transforms and loaders. Start with its two functions."""

from typing import TYPE_CHECKING, Any

from nearfar.ssl.data.sources.choose import open_source

if TYPE_CHECKING:
    from nearfar.ssl.data.loaders.choose import open_loader

__all__ = ["open_loader", "open_source"]


def __getattr__(name: str) -> Any:
    """`open_loader` when it is asked for: it needs torch, and a source does not."""
    if name == "open_loader":
        from nearfar.ssl.data.loaders.choose import open_loader

        return open_loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
