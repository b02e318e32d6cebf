from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import correlate1d
from torch import Tensor

import nearfar.ssl.backbones  # noqa: F401  makes torchvision importable everywhere
from nearfar.ssl.data.transforms import colors
from nearfar.ssl.data.transforms.colors import Color, blur, blur_taps, color, color_of, gray, shift_hue
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.settings.run import ViewSettings


def pictures(n: int = 12, size: int = 20, seed: int = 0) -> Tensor:
    """Noise, and the hard cases of hue: gray, black and white, pure colors, two equal channels."""
    x = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x[0] = x[0, :1]
    x[1] = (x[1] > 127) * 255
    x[2, 1] = x[2, 0]
    x[3, 2] = x[3, 1]
    return x


def plain(n: int, **changes: Tensor | int) -> Color:
    plan = Color(
        jitter=torch.zeros(n, dtype=torch.bool),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1),
        order=torch.arange(4, dtype=torch.uint8).repeat(n, 1),
        gray=torch.zeros(n, dtype=torch.bool),
        sigma=torch.zeros(n),
        solarize=torch.zeros(n, dtype=torch.bool),
    )
    return Color(**{**plan.__dict__, **changes})


def boxes(sigma: float) -> NDArray[Any]:
    """Three boxes with soft ends, convolved by numpy: the taps of a blur, from one end to the other.

    The box has length 2 r + 1, so the variance of a pass is sigma^2 / 3: r is found by bisection.
    """
    low, high = 0.0, 3 * sigma + 1
    for _ in range(200):
        r = (low + high) / 2
        whole = int(r)
        box = np.concatenate([[r - whole], np.ones(2 * whole + 1), [r - whole]])
        variance = (box * np.arange(-whole - 1, whole + 2) ** 2).sum() / box.sum()
        low, high = (r, high) if variance < sigma**2 / 3 else (low, r)
    return np.convolve(np.convolve(box, box), box) / box.sum() ** 3


def boxed(image: NDArray[Any], sigma: float) -> NDArray[Any]:
    """An image (3, s, s) blurred by `boxes`, cut at what reflection reaches."""
    taps = boxes(sigma)
    cut = max(0, len(taps) // 2 - image.shape[-1] + 1)
    taps = taps[cut : len(taps) - cut]
    for axis in (1, 2):
        image = correlate1d(image, taps / taps.sum(), axis, mode="mirror")
    return image


def expected(image: Tensor, plan: Color, k: int) -> Tensor:
    """One image through torchvision, operation by operation; the blur through scipy, with boxes."""
    from torchvision.transforms import functional as TF

    x = image.float() / 255
    if plan.jitter[k]:
        for op in plan.order[k].tolist():
            adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[op]
            x = adjust(x, float(plan.factors[k, op]))
    if plan.gray[k]:
        x = TF.rgb_to_grayscale(x, 3)
    if plan.sigma[k] > 0:
        x = torch.from_numpy(boxed(x.double().numpy(), float(plan.sigma[k]))).float()
    return TF.solarize(x, 128 / 255) if plan.solarize[k] else x


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([16, 21, 32]))
def test_a_planned_batch_equals_torchvision_one_image_at_a_time(seed: int, size: int) -> None:
    views = ViewSettings(local_crops_number=1, solarize_prob=(0.5, 0.2, 0.5), hue=0.5, blur_prob=(0.5, 0.5, 0.5))
    plan = plan_views(views, seed, 0, np.arange(12), np.full((12, 2), size))
    for view in range(3):
        parameters, images = color_of(plan, slice(view, view + 1)), pictures(12, size, seed % 1000)
        out = color(images, parameters)
        for k in range(12):
            reference = expected(images[k], parameters, k)
            if parameters.solarize[k]:  # 1e-7 at the threshold flips a pixel: compare those away from it
                unsolarized = color(images, Color(**{**parameters.__dict__, "solarize": torch.zeros(12) > 0}))[k]
                away = (unsolarized - 128 / 255).abs() > 1e-4
                torch.testing.assert_close(out[k][away], reference[away], rtol=1e-5, atol=1e-5)
            else:
                torch.testing.assert_close(out[k], reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", range(4))
def test_each_adjustment_alone_equals_torchvision(op: int) -> None:
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(12, 1)
    factors[:, op] = torch.linspace(-0.5, 0.5, 12) if op == 3 else torch.linspace(0, 2, 12)
    plan = plain(12, jitter=torch.ones(12, dtype=torch.bool), factors=factors)
    out = color(pictures(), plan)
    for k in range(12):
        torch.testing.assert_close(out[k], expected(pictures()[k], plan, k), rtol=1e-5, atol=2e-6)


def test_hue_equals_the_textbook_conversion() -> None:
    """colorsys in float64, pixel by pixel."""
    import colorsys

    x = pictures(5, 6).double() / 255
    turns = torch.tensor([0.1, -0.5, 0.5, -0.2, 0.03], dtype=torch.float64)
    out = shift_hue(x.clone(), turns)
    for k in range(5):
        for pixel, result in zip(x[k].flatten(1).T.tolist(), out[k].flatten(1).T.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert result == pytest.approx(colorsys.hsv_to_rgb((h + turns[k].item()) % 1, s, v), abs=1e-6)


def test_blur_is_three_soft_boxes_in_float64() -> None:
    x = pictures(9, 24).double() / 255
    sigma = torch.tensor([0.05, 0.1, 0.4, 0.9, 1.3, 1.41, 1.42, 2.0, 4.0], dtype=torch.float64)
    out = blur(x, sigma)
    for k in range(9):
        np.testing.assert_allclose(out[k].numpy(), boxed(x[k].numpy(), float(sigma[k])), atol=1e-10)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.9, 1.4, 1.5, 2.0, 6.0])
def test_the_taps_keep_the_variance(sigma: float) -> None:
    taps = blur_taps(torch.tensor([sigma], dtype=torch.float64), 30)[0]
    places = torch.arange(31)
    assert float(2 * taps.sum() - taps[0]) == pytest.approx(1, abs=1e-14)
    assert float(2 * (taps * places**2).sum()) == pytest.approx(sigma**2, rel=1e-9)


def test_no_blur_has_one_tap() -> None:
    assert blur_taps(torch.tensor([0.0, 2.0]), 6)[0].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_blur_of_one_image_does_not_depend_on_the_others() -> None:
    x, sigma = pictures(4, 16).float() / 255, torch.tensor([0.3, 2.0, 1.0, 0.1])
    torch.testing.assert_close(blur(x, sigma)[0], blur(x[:1], sigma[:1])[0])


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.3, 1.414, 1.42, 1.7, 2.0])
@pytest.mark.parametrize("kind", ["noise", "blocks"])
def test_blur_equals_pillows_but_for_its_rounding(sigma: float, kind: str) -> None:
    """Within three of 255 levels: Pillow rounds to 8 bits after each of its six passes. A Gaussian sampled at pixels
    is up to 33 levels away (sigma .3, noise)."""
    from PIL import ImageFilter

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 48, 3)) if kind == "noise" else rng.integers(0, 256, (8, 8, 3))
    image = Image.fromarray(np.kron(pixels, np.ones((48 // len(pixels),) * 2 + (1,))).astype("u1"))
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(float)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    ours = blur(x, torch.tensor([sigma]))[0].permute(1, 2, 0).numpy() * 255
    inside = slice(6, -6)  # borders are reflected here, and repeated there
    apart = np.abs(ours - theirs)[inside, inside]
    assert apart.max() < 3 and apart.mean() < 1.1
    assert sigma < 1.2 or (apart.max() < 2 and apart.mean() < 0.4)


def test_solarize_equals_pillow_exactly() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    out = color(images, plain(1, solarize=torch.tensor([True])))
    theirs = ImageOps.solarize(Image.fromarray(images[0].permute(1, 2, 0).numpy()), 128)
    np.testing.assert_array_equal((out[0].permute(1, 2, 0) * 255).round().byte().numpy(), np.asarray(theirs))
    assert torch.equal(color(images, plain(1, solarize=torch.tensor([True]), solarize_threshold=256)), images / 255)


def test_untouched_samples_stay_exactly_as_they_are() -> None:
    images = pictures()
    some = torch.arange(12) % 2 == 0
    out = color(images, plain(12, gray=some, sigma=some * 1.0, jitter=some))
    assert torch.equal(out[1::2], images[1::2].float() / 255)


def test_order_of_operations_matters_and_is_kept() -> None:
    images, n = pictures()[4:6], 2
    factors = torch.tensor([[1.4, 0.6, 1.0, 0.0]] * 2)
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]], dtype=torch.uint8)
    plan = plain(n, jitter=torch.ones(n, dtype=torch.bool), factors=factors, order=order)
    images[1] = images[0]
    out = color(images, plan)
    assert not torch.allclose(out[0], out[1])
    for k in range(n):
        torch.testing.assert_close(out[k], expected(images[k], plan, k))


def test_working_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    views = ViewSettings(local_crops_number=0)
    plan = color_of(plan_views(views, 0, 0, np.arange(12), np.full((12, 2), 20)), slice(0, 1))
    whole = color(pictures(), plan)
    monkeypatch.setattr(colors, "_CACHE", 5 * 4 * 3 * 20 * 20)  # 5 + 5 + 2 images
    torch.testing.assert_close(color(pictures(), plan), whole, rtol=0, atol=1e-6)


def test_parameters_of_a_group_run_view_by_view() -> None:
    plan = plan_views(ViewSettings(local_crops_number=3), 0, 0, np.arange(4), np.full((4, 2), 20))
    group = color_of(plan, slice(2, 5))
    assert group.sigma.tolist() == [plan.sigma[n, v] for v in range(2, 5) for n in range(4)]
    assert torch.equal(group.factors[4 * 1 + 2], torch.from_numpy(plan.factors[2, 3]))


def test_one_pixel_no_images_and_gray() -> None:
    one = color(torch.full((1, 3, 1, 1), 9, dtype=torch.uint8), plain(1, sigma=torch.ones(1)))
    assert one.flatten().tolist() == pytest.approx([9 / 255] * 3)
    assert color(pictures()[:0], plain(0)).shape == (0, 3, 20, 20)
    assert gray(torch.ones(1, 3, 2, 2)).mean() == pytest.approx(0.9999)  # as torchvision's


@pytest.mark.cuda
def test_the_gpu_gives_the_same() -> None:
    plan = plan_views(ViewSettings(), 0, 0, np.arange(12), np.full((12, 2), 20))
    for view in range(3):
        group = color_of(plan, slice(view, view + 1))
        group = Color(**{**group.__dict__, "solarize": torch.zeros(12) > 0})
        there = color(pictures().cuda(), group).cpu()
        torch.testing.assert_close(there, color(pictures(), group), rtol=1e-5, atol=1e-5)


def test_where_triton_does_not_work_colors_are_changed_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU without a C compiler the kernels ended the run at its first step; the scan and GAug did without."""
    cpu = torch.device("cpu")
    tried: list[tuple[int, ...]] = []

    def kernels(images: torch.Tensor, plan: Color) -> torch.Tensor:
        tried.append(images.shape)
        return colors.color(images, plan)

    monkeypatch.setattr(colors, "color_by_kernels", kernels)
    colors.kernels_missing.cache_clear()
    assert colors.kernels_missing(cpu) == "" and tried == [(1, 3, 4, 4)]

    def broken(images: torch.Tensor, plan: Color) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(colors, "color_by_kernels", broken)
    colors.kernels_missing.cache_clear()
    assert colors.kernels_missing(cpu) == "RuntimeError: Failed to find C compiler"
    assert colors.kernels_missing(cpu) and caplog.text.count("operation by operation, slower") == 1
    colors.kernels_missing.cache_clear()
