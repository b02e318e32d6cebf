"""Names that torch, timm and tensorboard do not promise to keep, and where each is used: what to look at first when a
newer version fails. Their versions are bounded in pyproject.toml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset


def test_lists_of_tensors_are_computed_in_place() -> None:
    """ssl/learning/optim.py, ssl/learning/loss_scale.py, ssl/parallel/gradients.py, ssl/learning/classifier.py."""
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0]])]
    assert [float(norm) for norm in torch._foreach_norm(tensors)] == [5, 1]
    torch._foreach_mul_(tensors, [torch.tensor(2.0), torch.tensor(3.0)])
    assert [x.flatten().tolist() for x in tensors] == [[6, 8], [3]]
    torch._foreach_mul_(tensors, torch.tensor(0.5))
    torch._foreach_copy_(tensors, [tensors[0] + 1, tensors[1] + 1])
    assert [x.flatten().tolist() for x in tensors] == [[4, 5], [2.5]]


def test_a_fused_update_of_sgd_takes_a_flag_that_keeps_everything_as_it_is() -> None:
    """ssl/learning/student_teacher.py: the teacher's update, gated on the device by whether the step was finite."""
    for bad, expected in ((0.0, 2.0), (1.0, 3.0)):
        weights = [torch.tensor([3.0])]
        torch._fused_sgd_(
            weights, [torch.tensor([1.0])], [], weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, found_inf=torch.tensor(bad),
        )  # fmt: skip
        assert float(weights[0]) == expected


def test_the_workers_of_a_loader_are_its_processes() -> None:
    """ssl/data/loaders/pillow.py: one that is killed is noticed, and all end with the loop."""
    stream: Any = iter(DataLoader(TensorDataset(torch.arange(4)), num_workers=1))
    next(stream)
    (worker,) = stream._workers
    assert worker.sentinel and worker.is_alive()
    stream._shutdown_workers()
    worker.join(timeout=30)
    assert worker.exitcode is not None


def test_the_compiler_says_whether_there_is_one() -> None:
    """ssl/learning/compiled.py."""
    from torch._inductor import cpp_builder, exc

    assert callable(torch._dynamo.reset) and callable(cpp_builder.get_cpp_compiler)
    assert issubclass(exc.InvalidCxxCompiler, Exception)


def test_the_cpu_says_whether_it_has_bf16() -> None:
    """ssl/parallel/device.py: the second name where the first is not there, as in torch 2.8."""
    older = ("_is_avx512_bf16_supported", "_is_amx_fp16_supported")
    assert hasattr(torch.cpu, "get_capabilities") or all(hasattr(torch.cpu, name) for name in older)


def test_a_writer_of_tensorboard_has_a_file_writer(tmp_path: Path) -> None:
    """ssl/run/tracking.py: the table of settings goes through it."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        assert callable(writer._get_file_writer().add_summary)


def test_modules_of_timm_convert_what_others_wrote() -> None:
    """ssl/backbones/weights.py: by the function of this name beside the model's class."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    state = model.state_dict()
    assert convert({"model": state}, model).keys() == state.keys()


def test_an_optimizer_leaves_everything_as_it_is_where_its_step_is_flagged() -> None:
    """ssl/learning/step.py: fused AdamW reads `found_inf`, as torch's own gradient scaler has it."""
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer: Any = torch.optim.AdamW([weight], lr=1.0, fused=True)
    weight.grad = torch.tensor([1.0])
    for flag, changed in ((1.0, False), (0.0, True)):
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(flag), None
        optimizer.step()
        assert (float(weight) != 3) == changed
