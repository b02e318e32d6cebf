"""What a run needs on 8, 64 and 512 GPUs: computed, from numbers you give or measure here. docs/scaling.md explains.

    python bench/scaling.py                          # the defaults
    python bench/scaling.py --gpus 16 --node-gpus 4 --network 12.5 --loader 300 --gpu-flops 300e12
    python bench/scaling.py --measure                # loader and checkpoint, on this machine, in about a minute

Nothing printed without --measure was measured on GPUs: it is arithmetic, and only as good as its inputs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Cluster:
    """What a user knows of machine, data and run. Rates are per second, sizes in bytes, times in seconds."""

    # the run
    images: float = 1.28e6
    epochs: float = 100
    per_gpu: int = 64  # images of a step on each GPU
    backbone: float = 21.7e6  # parameters (ViT-S/16)
    head: float = 22.3e6  # parameters (384 -> 2048 -> 2048 -> 256 -> 65,536)
    prototypes: float = 65536
    student_tokens: float = 2 * 197 + 8 * 37  # of an image: two global and eight local views
    teacher_tokens: float = 2 * 197
    image_bytes: float = 110e3  # a JPEG of ImageNet
    # the machines
    node_gpus: int = 8
    gpu_flops: float = 790e12  # bf16 matrix products, an H200
    utilization: float = 0.3  # share of it that a training step reaches: assumed
    nvlink: float = 300e9  # bytes that a GPU sends a second to others of its node
    network: float = 50e9  # bytes that a node sends a second to other nodes (400 Gbit/s)
    latency: float = 30e-6  # of a collective over the network
    node_mtbf: float = 5e6  # between two failures of a node: about two months
    restart: float = 300  # from a failure to the next step: detection, queue, start
    jitter: float = 0.03  # standard deviation of a GPU's step time, as a share of it
    # by --measure on the two shared cores of a small EPYC machine; yours will differ
    loader: float = 107.0  # images that a core prepares: decode 500x375, crop and resize ten views
    disk: float = 84e6  # bytes a second of a checkpoint: written, digested, synced


@dataclass(frozen=True)
class Needs:
    gpus: int
    batch: float
    lr_linear: float
    lr_sqrt: float
    steps: float
    images_a_second: float  # of all GPUs, with communication
    hours: float
    step: float  # compute alone
    gradients: float  # all-reduce of the gradients, as if none of it were hidden by the backward pass
    center: float  # all-reduce of the teacher's center
    waiting: float  # for the slowest GPU
    efficiency: float
    loader_cores: float  # a GPU
    reads: float  # bytes a second from the shared file system
    opens: float  # files a second
    checkpoint: float  # bytes
    writing: float  # seconds
    interval: float  # between two checkpoints (Young)
    mtbf: float  # of the job
    lost: float  # share of the time lost to checkpoints, repeated steps and restarts


def needs(cluster: Cluster, gpus: int) -> Needs:
    """Every formula of docs/scaling.md, in its order."""
    nodes = max(1, math.ceil(gpus / cluster.node_gpus))
    batch = gpus * cluster.per_gpu
    steps = cluster.epochs * cluster.images / batch
    flops = 6 * cluster.student_tokens * cluster.backbone + 2 * cluster.teacher_tokens * cluster.backbone
    flops += (6 * 10 + 2 * 2) * cluster.head  # once a view: ten of the student, two of the teacher
    step = cluster.per_gpu * flops / (cluster.gpu_flops * cluster.utilization)
    gradients = all_reduce(4 * (cluster.backbone + cluster.head), gpus, nodes, cluster)
    center = all_reduce(4 * cluster.prototypes, gpus, nodes, cluster)
    waiting = cluster.jitter * step * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0
    whole = step + gradients + center + waiting
    rate = batch / whole
    checkpoint = 4 * 4 * (cluster.backbone + cluster.head)  # student, teacher and AdamW's two moments, float32
    writing = checkpoint / cluster.disk
    mtbf = cluster.node_mtbf / nodes
    interval = math.sqrt(2 * writing * mtbf)
    return Needs(
        gpus=gpus,
        batch=batch,
        lr_linear=5e-4 * batch / 256,
        lr_sqrt=5e-4 * math.sqrt(batch / 256),
        steps=steps,
        images_a_second=rate,
        hours=steps * whole / 3600,
        step=step,
        gradients=gradients,
        center=center,
        waiting=waiting,
        efficiency=step / whole,
        loader_cores=rate / gpus / cluster.loader,
        reads=rate * cluster.image_bytes,
        opens=rate,
        checkpoint=checkpoint,
        writing=writing,
        interval=interval,
        mtbf=mtbf,
        lost=writing / interval + (interval / 2 + cluster.restart) / mtbf,
    )


def all_reduce(size: float, gpus: int, nodes: int, cluster: Cluster) -> float:
    """Seconds of a ring all-reduce of `size` bytes within, then between the nodes, overlapping with nothing."""
    if gpus == 1:
        return 0.0
    inside = min(gpus, cluster.node_gpus)
    seconds = 2 * (inside - 1) / inside * size / cluster.nvlink
    if nodes > 1:
        seconds += 2 * (nodes - 1) / nodes * size / cluster.network + cluster.latency * math.log2(nodes)
    return seconds


ROWS = (
    ("images a step", lambda n: f"{n.batch:,.0f}"),
    ("learning rate, linear / square root", lambda n: f"{n.lr_linear:.1e} / {n.lr_sqrt:.1e}"),
    ("steps", lambda n: f"{n.steps:,.0f}"),
    ("step: compute", lambda n: f"{1e3 * n.step:.1f} ms"),
    ("step: gradients / center", lambda n: f"{1e3 * n.gradients:.1f} / {1e3 * n.center:.2f} ms"),
    ("step: waiting for the slowest", lambda n: f"{1e3 * n.waiting:.1f} ms"),
    ("efficiency", lambda n: f"{100 * n.efficiency:.0f} %"),
    ("images a second", lambda n: f"{n.images_a_second:,.0f}"),
    ("hours", lambda n: f"{n.hours:.1f}"),
    ("loader cores a GPU", lambda n: f"{n.loader_cores:.1f}"),
    ("file system: read / opened", lambda n: f"{n.reads / 1e9:.2f} GB/s / {n.opens:,.0f} files/s"),
    ("checkpoint: size / writing", lambda n: f"{n.checkpoint / 1e9:.2f} GB / {n.writing:.1f} s"),
    ("failure of the job every", lambda n: f"{n.mtbf / 3600:,.0f} h"),
    ("best checkpoint interval", lambda n: f"{n.interval / 60:.0f} min"),
    ("lost to all that", lambda n: f"{100 * n.lost:.2f} %"),
)


def table(cluster: Cluster, counts: Sequence[int]) -> str:
    """A Markdown table, a column for each number of GPUs."""
    columns = [needs(cluster, gpus) for gpus in counts]
    lines = ["| | " + " | ".join(f"{gpus} GPUs" for gpus in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(show(column) for column in columns) + " |" for label, show in ROWS]
    return "\n".join(lines)


def measure() -> dict[str, float]:
    """Images a second that one core prepares, and bytes a second of a checkpoint, on this machine."""
    import numpy as np
    import torch
    from PIL import Image

    from nearfar.ssl import checkpoint
    from nearfar.ssl.data import open_loader, open_source
    from nearfar.ssl.data.loaders.base import LoaderOptions
    from nearfar.ssl.settings.run import ViewSettings

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for k in range(128):  # smooth noise: about the bytes of a photograph of this size
            noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
            noise.resize((500, 375), Image.Resampling.BICUBIC).save(pictures / f"{k}.jpg", quality=90)
        options = LoaderOptions(batch_size=32, epochs=3)
        loader = open_loader(open_source(str(pictures)), ViewSettings(), options)
        times = [time.process_time()]  # the core's: others may be busy with something else
        times += [time.process_time() for _ in loader]
        usual = statistics.median(later - sooner for sooner, later in itertools.pairwise(times[1:]))
        tensors = {f"{k}": torch.randn(1_000_000) for k in range(100)}
        seconds = []
        for step in range(3):
            begun = time.monotonic()
            checkpoint.save(Path(folder) / "checkpoints", step, tensors, {}, keep=1)
            seconds.append(time.monotonic() - begun)
    return {"loader": 32 / usual, "disk": 4e8 / statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--measure", action="store_true", help="measure loader and checkpoint on this machine first")
    for name, field in Cluster.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), help=f"default {field.default:g}")
    arguments = parser.parse_args()
    chosen = {name: value for name in Cluster.__dataclass_fields__ if (value := getattr(arguments, name)) is not None}
    if arguments.measure:
        measured = measure()
        print(
            f"Measured: {measured['loader']:.0f} images/s a core, checkpoints at {measured['disk'] / 1e6:.0f} MB/s.\n"
        )
        chosen = measured | chosen
    print(table(Cluster(**chosen), arguments.gpus))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
