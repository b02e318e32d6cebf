"""A SLURM cluster of several nodes inside this machine, while a test needs it; from Debian's packages, as root.

By hand: `python tests/slurm/cluster.py --nodes 2` says which SLURM_CONF to export and runs until Ctrl-C.

One process, the keeper, starts munge, slurmctld and a slurmd for each node in the foreground and declares itself the
reaper of whatever they leave behind. So every daemon, every step and every task is below it in the process tree, and
to stop the cluster is to end that tree. The kernel ends the keeper when its parent goes, however it goes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import psutil

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "sinfo")
NEEDED_TO_ACCOUNT = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def why_not(accounting: bool = False) -> str | None:
    """The reason why no cluster can be started here; None where one can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "the test cluster needs root on Linux (several slurmd on one machine)"
    names = NEEDED + (NEEDED_TO_ACCOUNT if accounting else ())
    if missing := [name for name in names if not shutil.which(name, path=_PATH)]:
        return f"SLURM is not installed ({', '.join(missing)} not found); .ci/run names the Debian packages"
    return None


class Cluster:
    """Context manager: a running cluster. `environment` is what clients need; node names are node1, node2, ...

    Partitions: main (default), low (preempted by high, 20 s grace), lownograce (0 s), lowcancel (cancelled, after
    20 s grace), high.
    """

    def __init__(self, nodes: int = 3, cpus: int = 8, accounting: bool = False) -> None:
        self._arguments = ["--nodes", str(nodes), "--cpus", str(cpus), *(["--accounting"] if accounting else [])]
        self._keeper: subprocess.Popen[str] | None = None
        self.folder = Path()
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="nearfar-slurm-"))
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, "--folder", str(self.folder), "--keep", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill_node(self, name: str) -> None:
        """What a power cut does to a node, with SLURM being told at once (it would notice after SlurmdTimeout)."""
        self._ask(f"kill-node {name}")

    def start_node(self, name: str) -> None:
        self._ask(f"start-node {name}")

    def kill_slurmd(self, name: str) -> None:
        """The daemon of a node alone: SLURM loses sight of the node, and what runs there lives on."""
        self._ask(f"kill-slurmd {name}")

    def stop_controller(self) -> None:
        self._ask("stop-controller")

    def start_controller(self) -> None:
        self._ask("start-controller")

    def signal_at_preemption(self, chosen: bool) -> None:
        """Whether preemption with grace sends the job's own --signal (True, as at start) or SIGTERM."""
        self._ask(f"signal-at-preemption {'yes' if chosen else 'no'}")

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in sorted((self.folder / "log").iterdir()))

    def _ask(self, text: str) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None
        self._keeper.stdin.write(text + "\n")
        self._keeper.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._keeper is not None and self._keeper.stdout is not None
        if (answer := self._keeper.stdout.readline().strip()) != "done":
            raise RuntimeError(f"The test cluster did not do it: {answer or 'its keeper died'}\n{self.logs()}")


class Keeper:
    """The process that owns the daemons. See the module's docstring."""

    def __init__(self, folder: Path, nodes: int, cpus: int, accounting: bool) -> None:
        self.folder, self.cpus, self.accounting = folder, cpus, accounting
        self.names = [f"node{number + 1}" for number in range(nodes)]
        self.ports = dict(zip(["ctld", "dbd", "sql", *self.names], _free_ports(3 + nodes), strict=True))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.preempt_signal = True
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        os.environ["PATH"] = _PATH

    def start(self) -> None:
        for name in ("log", "state", "spool", "munge", "sql"):
            (self.folder / name).mkdir(mode=0o755, exist_ok=True)
        self.folder.chmod(0o755)  # munge wants its socket to be reachable
        self._configure()
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        munge = [f"--{name}={self.folder}/munge/{name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *munge)
        _wait("munge", (self.folder / "munge" / "socket").exists)
        if self.accounting:
            self._start_accounting()
        self._daemon("slurmctld", "-D")
        _wait("slurmctld", lambda: _listens(self.ports["ctld"]))  # a slurmd that comes first tries again after 1 s
        for name in self.names:
            self.start_node(name)
        _wait("idle nodes", lambda: _output("sinfo", "-hNp", "main", "-o", "%T").count("idle") == len(self.names))

    def start_node(self, name: str) -> None:
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        self._daemon("slurmd", "-D", "-N", name, called=name)

    def kill_node(self, name: str) -> None:
        doomed = [process for process in _descendants() if _node_of(process) == name]
        steps = [parent for process in doomed if (parent := process.parent()) and parent.name() == "slurmstepd"]
        self.daemons.pop(name).kill()
        for process in {*steps, *doomed}:
            process.kill()
        subprocess.run(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed"], check=True)

    def kill_slurmd(self, name: str) -> None:
        self.daemons.pop(name).kill()
        subprocess.run(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost"], check=True)

    def stop_controller(self) -> None:
        controller = self.daemons.pop("slurmctld")
        controller.terminate()  # it saves its state
        controller.wait(timeout=30)

    def start_controller(self) -> None:
        self._daemon("slurmctld", "-D")
        _wait("slurmctld", lambda: _listens(self.ports["ctld"]))

    def signal_at_preemption(self, chosen: str) -> None:
        self.preempt_signal = chosen == "yes"
        self._configure()
        subprocess.run(["scontrol", "reconfigure"], check=True)

    def stop(self) -> None:
        """KILL to everything below, again until nothing is: neither state nor database is worth good manners."""
        while everyone := list(_descendants()):
            for process in everyone:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(everyone, timeout=5)

    def serve(self, commands: Iterator[str]) -> None:
        for command in commands:
            verb, *arguments = command.split()
            action = {
                "kill-node": self.kill_node,
                "start-node": self.start_node,
                "kill-slurmd": self.kill_slurmd,
                "stop-controller": self.stop_controller,
                "start-controller": self.start_controller,
                "signal-at-preemption": self.signal_at_preemption,
            }[verb]
            action(*arguments)
            print("done", flush=True)

    def _daemon(self, *command: str, called: str | None = None) -> None:
        name = called or command[0]
        with (self.folder / "log" / name).open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )

    def _start_accounting(self) -> None:
        data, quiet = self.folder / "sql" / "data", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        plain = ["--no-defaults", "--user=root", f"--datadir={data}"]
        subprocess.run(["mariadb-install-db", *plain, "--auth-root-authentication-method=normal"], check=True, **quiet)
        first = self.folder / "sql" / "first.sql"
        first.write_text(
            "create database slurm_acct_db;\n"
            "create user 'slurm'@'127.0.0.1' identified by 'slurm';\n"
            "grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1';\n"
        )
        self._daemon(
            "mariadbd", *plain, f"--socket={self.folder}/sql/socket", f"--port={self.ports['sql']}",
            "--bind-address=127.0.0.1", "--skip-name-resolve", f"--init-file={first}",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        _wait("the database", lambda: _listens(self.ports["sql"]))
        self._daemon("slurmdbd", "-D")
        _wait("slurmdbd", lambda: _listens(self.ports["dbd"]))
        subprocess.run(["sacctmgr", "-i", "add", "cluster", "test"], check=True, stdout=subprocess.DEVNULL)

    def _configure(self) -> None:
        host, memory = socket.gethostname(), psutil.virtual_memory().total // 2**20 // 2
        munge = self.folder / "munge" / "socket"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[name]} CPUs={self.cpus} "
            f"RealMemory={memory} State=UNKNOWN"
            for name in self.names
        )
        accounting = self._configure_accounting(host, munge)
        signalling = "SlurmctldParameters=preempt_send_user_signal\n" if self.preempt_signal else ""
        # cred_expire (default 120 s, at least 5) is how long a requeued job waits before it may start again.
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self.ports["ctld"]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1,bf_continue
SlurmdTimeout=10
BatchStartTimeout=60
KillWait=2
InactiveLimit=0
MinJobAge=600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{signalling}{accounting}{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=lownograce Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowcancel Nodes=ALL State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=20
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")  # slurmd looks for it; nothing here uses any

    def _configure_accounting(self, host: str, munge: Path) -> str:
        """Write slurmdbd's own configuration; what slurm.conf says of it."""
        if not self.accounting:
            return "AccountingStorageType=accounting_storage/none\n"
        secret = self.folder / "slurmdbd.conf"
        secret.touch(mode=0o600)
        secret.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={munge}\nDbdHost={host}\nDbdAddr=127.0.0.1\n"
            f"DbdPort={self.ports['dbd']}\nSlurmUser=root\nPidFile={self.folder}/slurmdbd.pid\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={self.ports['sql']}\n"
            "StorageUser=slurm\nStoragePass=slurm\nStorageLoc=slurm_acct_db\n"
        )
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={self.ports['dbd']}\n"
            f"AccountingStoragePass={munge}\n"
        )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(what: str, ready: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come up within {seconds:g} s")
        time.sleep(0.01)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}) failed")


def _die_with_parent() -> None:
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def _descendants() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.NoSuchProcess:
            continue


def _node_of(process: psutil.Process) -> str | None:
    """The node on which SLURM started a task, as its environment says."""
    try:
        return process.environ().get("SLURMD_NODENAME")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _commands() -> Iterator[str]:
    """Lines of standard input, until it closes; between them, what the daemons left behind is reaped."""
    while True:
        if select.select([sys.stdin], [], [], 0.5)[0]:
            if not (line := sys.stdin.readline()):
                return
            yield line
        for process in psutil.Process().children():
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def main() -> None:
    parser = argparse.ArgumentParser(description="A throw-away SLURM cluster on this machine; Ctrl-C ends it.")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=8, help="of each node, whatever the machine really has")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and a database, for sacct")
    parser.add_argument("--folder", type=Path, help="where configuration, state and logs go")
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if reason := why_not(arguments.accounting):
        sys.exit(reason)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(1))
    if arguments.keep:
        _prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it closes our input
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="nearfar-slurm-"))
    keeper = Keeper(folder, arguments.nodes, arguments.cpus, arguments.accounting)
    try:
        keeper.start()
        print("done" if arguments.keep else f"export SLURM_CONF={folder}/slurm.conf", flush=True)
        keeper.serve(_commands())
    except KeyboardInterrupt:
        pass
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        keeper.stop()
        if arguments.keep or not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
