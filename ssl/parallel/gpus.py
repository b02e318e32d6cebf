"""The GPUs that this process sees: how many, why none, whether two ranks share one, and whether one has room.

None of it has been run on a GPU: the tests put other answers in torch's place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

import torch

from nearfar.ssl.errors import UserError

HIDING = "CUDA_VISIBLE_DEVICES"


def visible(device: str, setting: str = "train.device=") -> int:
    """GPUs that `device` (auto, cpu or cuda) may use here; those that CUDA_VISIBLE_DEVICES hides do not count.

    setting: the option by which the user chose a device, as the message repeats it.

    Raises:
        UserError: cuda, and there is none.
    """
    if device == "cpu":
        return 0
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if device == "cuda":
        raise UserError(none_visible(setting))
    return 0


def none_visible(setting: str, env: Mapping[str, str] = os.environ) -> str:
    """Why torch sees no GPU, as far as that can be told, and what would help."""
    if torch.version.cuda is None and torch.version.hip is None:
        why = (
            f"this torch ({torch.__version__}) was built for CPUs only. On a machine with an NVIDIA GPU, `pip install "
            "--force-reinstall torch torchvision` without the index of CPU builds (--index-url, or -c "
            "constraints.txt) installs one for CUDA"
        )
    elif HIDING in env and env[HIDING].strip() in ("", "-1", "NoDevFiles"):
        why = f"{HIDING}={env[HIDING]!r} hides them all. Unset it, or name some: {HIDING}=0,1"
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        named = f", and {HIDING}={env[HIDING]} names GPUs that are there" if HIDING in env else ""
        why = (
            f"this torch ({torch.__version__}) was built for {built}. See that `nvidia-smi` lists a GPU, with a driver "
            f"for that version or newer{named}; inside a container or a job, that it was given one"
        )
    return f"{setting}cuda, but torch sees no CUDA device here: {why}. Or use {setting}cpu or auto, which take the CPU."


def identity(index: int) -> str:
    """A name of a GPU that is the same in every process of its machine, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(index).uuid)


def require_room(device: torch.device, needed: int, what: str) -> None:
    """Refuse a GPU that others have filled, before anything is put on it; nothing on a CPU.

    needed: bytes. what: is going to take them, in words.

    Raises:
        UserError: naming the processes that hold the memory, as far as `nvidia-smi` lists them.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    advice = (
        f"Wait for what is on it or end it, choose another GPU with {HIDING}, take a smaller network, or compute on "
        "the CPU."
    )
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # not even the driver's own part fits, or another process has it to itself
        why = " ".join(str(error).split())[:200]
        raise UserError(f"GPU {index} cannot be used ({why}).{_in_words(_occupants(None))} {advice}") from error
    if free < needed:
        name = torch.cuda.get_device_name(index)
        raise UserError(
            f"GPU {index} ({name}) has {free / 1e9:.1f} of its {total / 1e9:.1f} GB free, and {what} take "
            f"{needed / 1e9:.1f} GB.{_in_words(_occupants(identity(index)))} {advice}"
        )


def _in_words(occupants: list[str]) -> str:
    return f" Its memory is held by {', '.join(occupants)}." if occupants else ""


def _occupants(uuid: str | None) -> list[str]:
    """The other processes on a GPU (None: on any), the largest first; empty where the driver does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) == 4 and parts[1] != str(os.getpid()) and (uuid is None or uuid in parts[0]):
            megabytes = float(parts[2]) * 1.048576 if parts[2].isdigit() else 0.0
            found.append((megabytes, f"process {parts[1]} ({os.path.basename(parts[3])}, {megabytes / 1e3:.1f} GB)"))
    return [text for _, text in sorted(found, reverse=True)[:4]]
