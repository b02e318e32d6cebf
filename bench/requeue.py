"""What each kind of interruption costs a run on SLURM: steps lost, and seconds until the next step.

    python bench/requeue.py

Runs tests/slurm/test_interruptions.py (root, SLURM installed) on its own throw-away cluster of three nodes and prints
the table of docs/cluster.md. These seconds include the import of torch by two processes, and the 5 s that this cluster
makes a requeued job wait (SLURM's default is 120 s: `cred_expire` in AuthInfo).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "interruptions.jsonl"
        command = [sys.executable, "-m", "pytest", "tests/slurm/test_interruptions.py", "-p", "no:cacheprovider"]
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"NEARFAR_INTERRUPTIONS": str(file)}, check=False)
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    print("| interruption | steps lost | seconds to the next step |\n|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['lost']} | {row['seconds']:.0f} |")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
