"""What a job asks of a cluster: defaults written once for a site, overridden by the flags of `nearfar launch`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nearfar.ssl.disk import bounded_files
from nearfar.ssl.errors import UserError
from nearfar.ssl.settings.messages import in_words

# Fields that only the site file can set; and options of sbatch that have a field of their own or that nearfar sets.
FILE_ONLY = ("setup", "node_setup", "srun_args", "python", "extra")
_REFUSED_EXTRAS = {
    "nodes": "use nodes", "ntasks": "use tasks_per_node", "ntasks-per-node": "use tasks_per_node",
    "gpus-per-node": "use gpus_per_node, which may name a type: a100:8", "gpus": "use gpus_per_node",
    "gpus-per-task": "use gpus_per_node", "cpus-per-task": "use cpus_per_task", "mem": "use mem_gb",
    "time": "use hours", "partition": "use partition", "account": "use account", "qos": "use qos",
    "constraint": "use constraint", "exclude": "use exclude", "signal": "use signal_delay: the job answers USR2",
    "requeue": "a job goes on by being requeued; where that is forbidden, `nearfar launch resubmit` continues it",
    "no-requeue": "a job goes on by being requeued; where that is forbidden, `nearfar launch resubmit` continues it",
    "array": "use --sweep and --parallel", "job-name": "use name=", "output": "status and logs look for it",
    "error": "status and logs look for it", "open-mode": "all attempts share a log", "dependency": "use --then",
    "export": "the job needs the environment that setup makes",
}  # fmt: skip


class Resources(BaseModel):
    """One job's share of a cluster. Every field but those of FILE_ONLY is also a flag."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: int = Field(1, ge=1, description="machines")
    gpus_per_node: int | str | None = Field(
        None, description="GPUs of each machine, and processes unless set: 8, or with a type, a100:8"
    )
    tasks_per_node: int | None = Field(None, ge=1, description="processes on each machine (default: one a GPU, or 1)")
    cpu: bool = Field(False, description="train on CPUs (gloo) and ask for no GPU")
    cpus_per_task: int = Field(8, ge=1, description="cores of each process: data workers, and the network on a CPU")
    mem_gb: float | None = Field(None, gt=0, description="memory of each machine, in GB (default: SLURM's)")
    hours: float = Field(24.0, gt=0, description="time limit of one attempt; the job goes on in the next one")
    partition: str | None = Field(None, description="SLURM partition")
    account: str | None = Field(None, description="SLURM account")
    qos: str | None = Field(None, description="SLURM quality of service")
    constraint: str | None = Field(None, description="node features that are needed")
    exclude: str | None = Field(None, description="nodes that are not wanted")
    mail: str | None = Field(None, description="address that SLURM writes to at the end, at a failure and at a requeue")
    tries: int = Field(3, ge=1, description="attempts without progress before the job gives up")
    signal_delay: int | None = Field(
        None, ge=1, description="seconds before the time limit at which to save (default: from measured times)"
    )
    setup: list[str] = Field([], description="shell lines before srun, such as module load, on the first node")
    node_setup: list[str] = Field([], description="shell lines once on every node, such as copying data to its disk")
    srun_args: list[str] = Field([], description="more arguments for srun, such as --container-image=...")
    python: str | None = Field(None, description="shell words that start Python (default: the one that submits)")
    extra: dict[str, str | int | bool] = Field({}, description="any other option of sbatch, by its long name")

    @field_validator("gpus_per_node")
    @classmethod
    def _gpus(cls, value: int | str | None) -> int | str | None:
        if value is None:
            return None
        if not re.fullmatch(r"([A-Za-z0-9_.-]+:)?[1-9][0-9]*", str(value)):
            raise ValueError("write a number, or type:number such as a100:8")
        return int(value) if str(value).isdigit() else value

    @field_validator("extra")
    @classmethod
    def _extras(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        plain = {key.replace("_", "-"): entry for key, entry in value.items()}
        if wrong := [f"{key} ({_REFUSED_EXTRAS[key]})" for key in plain if key in _REFUSED_EXTRAS]:
            raise ValueError(f"not through extra: {', '.join(wrong)}")
        return plain

    @property
    def gpus(self) -> int:
        """GPUs of each machine, whatever their type."""
        return gpu_count(self.gpus_per_node)

    @property
    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or self.gpus or 1

    @property
    def world(self) -> int:
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """SLURM's time limits are whole minutes."""
        return max(1, round(60 * self.hours))

    def one_process(self, hours: float) -> Resources:
        """The share of a job of one process, with one GPU of the same type where there is one."""
        one: int | str | None = None if self.cpu or not self.gpus else 1
        if one and ":" in str(self.gpus_per_node):
            one = f"{str(self.gpus_per_node).rpartition(':')[0]}:1"
        extra = dict(self.extra)
        if "gres" in extra:
            extra["gres"] = re.sub(r"(gpu(?::[^:,]+)??):\d+(?=,|$|\()", r"\1:1", str(extra["gres"]))
        chosen = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": one, "hours": min(self.hours, hours)}
        return self.model_copy(update={**chosen, "extra": extra})


def gpu_count(value: int | str | None) -> int:
    """`8` and `a100:8` -> 8; None -> 0."""
    return 0 if value is None else int(str(value).rpartition(":")[2])


def site_file() -> Path:
    """Where a site's defaults are looked for: ~/.config/nearfar/slurm.yaml."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "nearfar" / "slurm.yaml"


def load(file: Path | None, given: dict[str, Any]) -> Resources:
    """The resources of a job: what was `given`, else what the site's file says, else the defaults.

    Raises:
        UserError: a named file that is not there, or anything in it or given that cannot be.
    """
    if file is not None and not file.is_file():
        raise UserError(f"There is no site file {file}.")
    file = file or site_file()
    tree = bounded_files.read_yaml(file, "site file", "lines such as 'partition: gpu'") if file.is_file() else {}
    return check({**tree, **given}, f"in {file} or the flags" if tree else "in the flags")


def check(tree: dict[str, Any], where: str) -> Resources:
    """`tree` as Resources, or one UserError with all that is wrong."""
    problems: list[str] = []
    try:
        found = Resources.model_validate({str(key): value for key, value in tree.items()})
    except ValidationError as error:
        problems += [mistake.message for mistake in in_words(error, list(Resources.model_fields), "nearfar launch")]
    else:
        if found.cpu and found.gpus_per_node:
            problems.append("--cpu asks for no GPU, and gpus_per_node asks for some: choose one")
        if not found.cpu and not found.gpus_per_node:
            raise UserError(
                "What should the job run on? Say --gpus-per-node 8, or how many GPUs each node has for it (one process "
                f"is started on each), or --cpu. `gpus_per_node: 8` in {site_file()} says it for every job."
            )
        if not problems:
            return found
    raise UserError(f"The resources {where} cannot be used: {'; '.join(problems)}.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field; what is not given stays out of the namespace's values (None)."""
    for name, field in Resources.model_fields.items():
        if name in FILE_ONLY:
            continue
        flag, default = "--" + name.replace("_", "-"), field.default
        help_text = (field.description or "") + (
            "" if default is None or default is False else f" (default {default:g})"
        )
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=None, help=help_text)
        else:
            kinds = [kind for kind in (str, int, float) if kind.__name__ in str(field.annotation)]
            parser.add_argument(flag, type=kinds[0] if kinds else str, help=help_text)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by field."""
    values = {name: getattr(arguments, name, None) for name in Resources.model_fields if name not in FILE_ONLY}
    return {name: value for name, value in values.items() if value is not None}
