"""`python -m nearfar.launch.rank SETTINGS.yaml`: one rank of a run, as `nearfar`, torchrun or SLURM start it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nearfar.launch.pretrain import train_rank
from nearfar.ssl import config
from nearfar.ssl.distributed import from_environment
from nearfar.ssl.errors import EXIT_PEER, PeerError, UserError


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done (or stopped on request, saved), 2 a mistake of the user's, 3 another rank ended."""
    end_with_parent()
    world = from_environment()
    try:
        train_rank(config.load(Path(argv[0])), Console(quiet=not world.first), world)
    except UserError as error:
        if world.first:  # the others' words reach it
            print(f"nearfar: {error}", file=sys.stderr)
        return 2
    except PeerError as error:
        if world.first:
            print(f"nearfar: {error}", file=sys.stderr)
        return EXIT_PEER
    return 0


def end_with_parent() -> None:
    """A rank whose starter is gone ends too: before the ranks have met, no broken connection would tell it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(EXIT_PEER)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
