"""`python -m nearfar.launch.local.rank SETTINGS.yaml`: one rank of a run, as `nearfar`, torchrun or SLURM start it.

`-` in place of the file reads the settings as JSON from standard input; a second argument is the
process id of the starter.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from nearfar.ssl.errors import EXIT_PEER, EXIT_USER, PeerError, UserError


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done (or stopped on request, saved), 2 a mistake of the user's, 3 another rank ended."""
    # Before torch is imported, which takes seconds: if the starter dies meanwhile, this process must notice.
    end_with(int(argv[1]) if len(argv) > 1 else os.getppid())

    from rich.console import Console

    from nearfar.launch.local.any_run import train_rank
    from nearfar.ssl.parallel.distributed import from_environment, met
    from nearfar.ssl.settings.finetune_settings import recorded, recorded_in

    world = from_environment()
    try:
        run = recorded(json.loads(sys.stdin.read())) if argv[0] == "-" else recorded_in(Path(argv[0]))
        train_rank(run, Console(quiet=not world.first), world)
    except UserError as error:
        if world.first or not met():  # the first has received the message of the others
            print(f"nearfar: {error}", file=sys.stderr)
        return EXIT_USER
    except PeerError as error:
        if world.first:
            print(f"nearfar: {error}", file=sys.stderr)
        return EXIT_PEER
    return 0


def end_with(parent: int) -> None:
    """End this process as soon as `parent` is gone: until the ranks are connected, no broken connection would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(EXIT_PEER)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    faulthandler.enable()  # a crash in compiled code says where
    sys.exit(main(sys.argv[1:]))
