"""Buckets of gradients: fixed by the order of the parameters, and with the mean over all ranks in them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from nearfar.ssl.parallel.gradients import GradientMean, in_buckets


def test_buckets_hold_every_parameter_once_the_last_first() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 100, 3, 3, 3, 2)]
    numbers = {id(p): number for number, p in enumerate(parameters)}
    found = [[numbers[id(p)] for p in bucket] for bucket in in_buckets(parameters, 4 * 8)]
    assert found == [[5, 4, 3], [2], [1], [0]]  # 4 bytes a number; what is larger than a bucket has its own


def test_alone_gradients_and_riders_are_ones_own() -> None:
    layer = nn.Linear(3, 2)
    mean = GradientMean(layer.parameters())
    mean.begin()
    layer(torch.ones(1, 3)).sum().backward()
    riders = torch.tensor([1.5, 0.0])
    assert mean.finish(riders) is riders and layer.weight.grad is not None and float(layer.weight.grad.sum()) == 6


RANKS = """
    import json
    import torch
    import torch.distributed as dist
    from torch import nn
    from nearfar.ssl.parallel import distributed
    from nearfar.ssl.parallel.gradients import GradientMean

    world = distributed.from_environment()
    with distributed.joined(world):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).double()
        unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        mean = GradientMean([unused, *net.parameters()], 8 * 20)
        sent, reduce = [], dist.all_reduce
        dist.all_reduce = lambda flat, **options: sent.append((len(flat), running)) or reduce(flat, **options)
        lines = []
        for step in range(3):
            for p in net[4].parameters():
                p.requires_grad_(step != 1)
            x = torch.full((2, 4), 1.0 + world.rank + step, dtype=torch.float64)
            net.zero_grad()
            net(x).square().sum().backward()  # without begin nothing is sent
            own = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            net.zero_grad()
            mean.begin()
            running = True
            net(x).square().sum().backward()
            running = False
            riders = mean.finish(torch.tensor([1.0 * world.rank, 2.0], dtype=torch.float64)).tolist()
            assert unused.grad is None
            flat = torch.cat([g.flatten() for g in own])
            everyone = [torch.empty_like(flat) for _ in range(world.size)]
            dist.all_gather(everyone, flat)
            found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            torch.testing.assert_close(found, torch.stack(everyone).mean(0), rtol=1e-12, atol=0)
            lines.append([riders, sent.copy(), net[4].weight.grad is None])
            sent.clear()
        print(json.dumps(lines))
"""


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_the_mean_over_all_ranks_and_leave_while_the_backward_pass_runs(
    size: int, tmp_path: Path
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ
            | {k: str(v) for k, v in (shared | {"OMP_NUM_THREADS": 1, "RANK": r, "LOCAL_RANK": r}).items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    # Older gloos say on stdout that they are connected.
    output = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size
    assert len(set(output)) == 1
    for step, (riders, sent, frozen) in enumerate(json.loads(output[0])):
        assert riders == [(size - 1) / 2, 2] and frozen == (step == 1)
        assert sum(length for length, _ in sent) == (80 if step == 1 else 100) + 2
        during = [early for _, early in sent]
        assert len(during) >= 5 and during == [True] * (len(during) - 1) + [False]
