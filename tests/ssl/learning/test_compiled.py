"""train.compile: the same numbers up to rounding, one graph a size of view, no recompilation, no other names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch._dynamo.utils import counters

from nearfar.ssl import checkpoint, train
from nearfar.ssl.backbones import Backbone, create
from nearfar.ssl.data.sources.base import ArraySource
from nearfar.ssl.errors import UserError
from nearfar.ssl.learning import compiled
from nearfar.ssl.learning.dino import build_dino_learner
from nearfar.ssl.learning.optim import adamw
from nearfar.ssl.learning.step import Stepper
from nearfar.ssl.settings.defaults import resolve
from nearfar.ssl.settings.run import Run

Make = Callable[..., Run]
CPU = torch.device("cpu")
LONG = pytest.mark.long
VALUES = {"lr": 1e-3, "weight_decay": 0.04, "teacher_momentum": 0.9, "teacher_temp": 0.04}
SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 3, "drop_path": 0.2}
PLAIN = {**SMALL, "num_heads": 2}
ALL = {**PLAIN, "lgp": True, "gaug": True, "prr": True}
NETWORKS = [
    pytest.param(("vit_tiny_patch8", PLAIN), id="vit"),
    pytest.param(("vit_tiny_patch8", ALL), id="lgp, gaug and prr"),
    pytest.param(
        ("vit_tiny_patch8", {**PLAIN, "rope": True, "registers": 2}), id="rope and registers", marks=pytest.mark.long
    ),
    pytest.param(("vim_tiny_patch8", SMALL), id="vim"),
    pytest.param(("timm/vit_tiny_patch16_224", {**PLAIN, "gaug": True}), id="timm", marks=LONG),
]


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def passes(backbone: Backbone, views: list[Tensor]) -> list[Tensor]:
    """Tokens of every view and the gradient of every weight, drop-path seeded as a step seeds it."""
    torch.manual_seed(3)
    backbone.zero_grad()
    tokens = [backbone(group) for group in views]
    everything = [torch.cat([each.prefix, each.patches], 1) for each in tokens]
    target = torch.randn(everything[0].shape[-1], generator=torch.Generator().manual_seed(0))
    torch.stack([(each * target).square().mean() for each in everything]).sum().backward()
    return [t.detach() for t in everything] + [p.grad.clone() for p in backbone.parameters() if p.grad is not None]


def close(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all(float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-7 for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.long)])
def test_traced_blocks_compute_the_same_values_and_gradients(network: tuple[str, Any], recompute: bool) -> None:
    """Tracing and autograd alone, without a code generator: what a wrong guard or a lost random number would change."""
    backbone = create(network[0], **network[1]).train()
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    names = list(backbone.state_dict())
    expected = passes(backbone, views)
    if recompute:
        backbone.model.set_grad_checkpointing(True)
    compiled.compile_backbone(backbone, CPU, backend="aot_eager")
    assert close(passes(backbone, views), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert list(backbone.state_dict()) == names  # no _orig_mod.
    graphs = counters["stats"]["unique_graphs"]
    backbone.eval()
    with torch.no_grad():
        backbone(torch.randn(3, 3, 24, 24) if network[0].startswith("vi") else views[0][:3])  # a score's other sizes
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("network", [NETWORKS[1], pytest.param(*NETWORKS[3].values, marks=pytest.mark.long, id="vim")])
def test_compiled_blocks_compute_the_same_values_and_gradients(network: tuple[str, Any]) -> None:
    """By the code generator itself, of views of one size: it takes a third of a minute for each."""
    backbone = create(network[0], **network[1]).train()
    views = [torch.randn(4, 3, 32, 32)]
    expected = passes(backbone, views)
    compiled.compile_backbone(backbone, CPU)
    first, again = passes(backbone, views), passes(backbone, views)
    assert close(first, expected) and len(expected) > 30
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_one_graph_for_each_size_of_view_and_no_other_in_later_steps(
    tiny: Make, drop_path: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student: a graph a size, and with drop-path another for the first block, which has none. Teacher: one."""
    run = resolve(tiny("train.batch_size=4", f"backbone.drop_path={drop_path}", "backbone.depth=4"), 40)[0]
    learner = build_dino_learner(run)
    for network in (learner.student, learner.teacher):
        compiled.compile_backbone(network.backbone, CPU, backend="aot_eager")
    views = [torch.randn((2, 4, 3, side, side), generator=torch.Generator().manual_seed(side)) for side in (32, 16)]
    stepper = Stepper(learner, adamw(learner.student), 3.0)
    assert stepper(views, VALUES).report.read().finite
    assert counters["stats"]["unique_graphs"] == (5 if drop_path else 3)
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frozen in (True, False, False):
            assert stepper(views, VALUES, freeze_last_layer=frozen).report.read().finite
    assert counters["stats"]["unique_graphs"] == (5 if drop_path else 3)


def test_another_batch_is_refused_where_recompiling_is_an_error() -> None:
    """The test above could fail."""
    backbone = create("vit_tiny_patch8", **PLAIN).train()
    compiled.compile_backbone(backbone, CPU, backend="aot_eager")
    backbone(torch.randn(4, 3, 32, 32))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match=r"(?i)recompil"):
        backbone(torch.randn(5, 3, 32, 32))


def test_a_run_is_continued_compiled_and_uncompiled_and_says_so(
    tiny: Make, images: ArraySource, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_one = compiled.compile_backbone
    monkeypatch.setattr(compiled, "compile_backbone", lambda b, d: compile_one(b, d, backend="aot_eager"))
    plain, mixed = tiny(folder="plain"), tiny("train.compile=false", folder="mixed")
    other = tiny("train.compile=true", folder="mixed")
    train.pretrain(plain, images, console=quiet)
    steps = iter(range(1, 21))
    train.pretrain(mixed, images, should_stop=lambda: next(steps) == 6, console=quiet)
    steps = iter(range(7, 21))
    train.pretrain(other, images, should_stop=lambda: next(steps) == 13, console=quiet)
    assert train.pretrain(mixed, images, console=quiet).finished
    log = (mixed.path / "run.log").read_text()
    assert "Saved in float32, continued in float32, compiled: the same run, but not the same bits." in log
    assert "Saved in float32, compiled, continued in float32: the same run, but not the same bits." in log
    one, two = (checkpoint.latest(run.path / "checkpoints") for run in (plain, mixed))
    assert one is not None and two is not None and one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():  # drop-path drew the same numbers all along
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from torch._inductor import config

    monkeypatch.setenv("CXX", "/nowhere/g++")
    with config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        yield


def test_without_a_compiler_compile_is_refused_in_a_sentence(
    tiny: Make, images: ArraySource, quiet: Console, no_compiler: None
) -> None:
    with pytest.raises(UserError, match=r"train\.compile=true, but torch\.compile needs a C\+\+ compiler.*=false"):
        train.pretrain(tiny("train.compile=true"), images, console=quiet)


def test_auto_goes_on_without_a_compiler_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    backbone = create("vit_tiny_patch8", **PLAIN)
    monkeypatch.setattr(compiled, "compiler_missing", lambda _: "there is no compiler")
    assert not compiled.switch_on([backbone], "auto", torch.device("cuda"), messages)
    assert messages == ["Nothing is compiled (train.compile=auto), so steps are slower: there is no compiler."]
    assert not compiled.switch_on([backbone], "auto", CPU, messages) and len(messages) == 1
    assert not compiled.switch_on([backbone], False, torch.device("cuda"), messages) and len(messages) == 1
    assert backbone.model.compiled is None


def test_what_is_not_ours_is_named() -> None:
    with pytest.raises(UserError, match="does not know how to compile a Backbone"):
        compiled.compile_backbone(Backbone(), CPU)


@pytest.mark.parametrize("text", ["sometimes", "2", "[true]"])
def test_a_wrong_value_is_named(tiny: Make, text: str) -> None:
    with pytest.raises(UserError, match=r"train\.compile"):
        tiny(f"train.compile={text}")


def test_settings_are_read_as_written(tiny: Make) -> None:
    assert tiny().train.compile == "auto"
    assert tiny("train.compile=true").train.compile is True
    assert tiny("train.compile=false").train.compile is False


@pytest.mark.long
def test_the_folder_holds_nothing_of_the_compiler(
    tiny: Make, images: ArraySource, quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_one = compiled.compile_backbone
    monkeypatch.setattr(compiled, "compile_backbone", lambda b, d: compile_one(b, d, backend="aot_eager"))
    run = tiny("train.compile=true", "train.epochs=1")
    train.pretrain(run, images, console=quiet)
    plain = tiny("train.compile=false", "train.epochs=1", folder="plain")
    train.pretrain(plain, images, console=quiet)
    shapes = [
        {name: tensor.shape for name, tensor in checkpoint.load(each.path).state_dict().items()}
        for each in (run, plain)
    ]
    assert shapes[0] == shapes[1]
