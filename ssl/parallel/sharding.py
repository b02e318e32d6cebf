"""Student, teacher and optimizer split over the ranks by torch's `fully_shard` (FSDP2), for networks that are too big.

Every rank holds its rows of each tensor. A block's weights are gathered for its forward and backward pass and dropped
again; gradients come back as the mean over the ranks, in rows. A checkpoint holds whole tensors and does not know.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from nearfar.ssl.errors import UserError


def shard(network: nn.Module, learns: bool) -> None:
    """Split the weights of a network, which is whole on every rank's device, over all ranks that are joined.

    Each child of a `blocks` (as timm's networks and ours call them) is gathered on its own, the rest as one; a network
    without any is gathered whole. Buffers stay whole on every rank.

    learns: the network has a backward pass, before which the weights outside the blocks need not be dropped.

    Raises:
        UserError: a weight that cannot be split.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0 or not parameter.is_contiguous():
            kind = "a single number" if parameter.ndim == 0 else "not contiguous in memory"
            raise UserError(
                f"train.shard=true cannot split this backbone: {name} is {kind}, which torch's fully_shard does not "
                "take. Use train.shard=false, or another backbone.name."
            )
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for blocks in [child for name, child in network.named_modules() if name.rpartition(".")[2] == "blocks"]:
        for block in blocks.children():
            fully_shard(block, mesh=mesh)
    # Weights that stay gathered after a pass are dropped by the backward pass; without one they would stay as they
    # were while the teacher moves on.
    fully_shard(network, mesh=mesh, reshard_after_forward=not learns)
    if device.type == "cpu":  # gloo of torch 2.8 silently sums where it is asked for the mean
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's rows, in place; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, for which every rank must call; another tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def split_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, split as `like` is and on its device: a copy of this rank's rows, or of all."""
    if not isinstance(like, DTensor):
        return full.to(like.device, copy=True)
    mine, mesh = like.to_local(), like.device_mesh
    first = mesh.get_local_rank() * -(-len(full) // mesh.size())  # as torch.chunk splits: the last ranks may get none
    rows = full.narrow(0, min(first, len(full)), len(mine)).to(mine.device, copy=True)
    return DTensor.from_local(rows, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
