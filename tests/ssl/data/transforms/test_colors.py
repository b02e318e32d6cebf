import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter1d

import nearfar.ssl.backbones  # noqa: F401  makes torchvision importable everywhere
from nearfar.ssl.data.transforms import colors
from nearfar.ssl.data.transforms.colors import Color, blur, color, color_of, gray, shift_hue
from nearfar.ssl.data.views import plan_views
from nearfar.ssl.settings import ViewSettings


def pictures(n=12, size=20, seed=0):
    """Noise, and the hard cases of hue: gray, black and white, pure colors, two equal channels."""
    x = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x[0] = x[0, :1]
    x[1] = (x[1] > 127) * 255
    x[2, 1] = x[2, 0]
    x[3, 2] = x[3, 1]
    return x


def plain(n, **changes):
    plan = Color(
        jitter=torch.zeros(n, dtype=torch.bool),
        factors=torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1),
        order=torch.arange(4, dtype=torch.uint8).repeat(n, 1),
        gray=torch.zeros(n, dtype=torch.bool),
        sigma=torch.zeros(n),
        solarize=torch.zeros(n, dtype=torch.bool),
    )
    return Color(**{**plan.__dict__, **changes})


def expected(image, plan, k):
    """One image through torchvision, operation by operation."""
    from torchvision.transforms import functional as TF

    x = image.float() / 255
    if plan.jitter[k]:
        for op in plan.order[k].tolist():
            adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)[op]
            x = adjust(x, float(plan.factors[k, op]))
    if plan.gray[k]:
        x = TF.rgb_to_grayscale(x, 3)
    if plan.sigma[k] > 0:
        reach = min(int(np.ceil(3 * plan.sigma[k].item())), image.shape[-1] - 1)
        x = TF.gaussian_blur(x, [2 * reach + 1] * 2, [float(plan.sigma[k])] * 2)
    return TF.solarize(x, 128 / 255) if plan.solarize[k] else x


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([16, 21, 32]))
def test_a_planned_batch_equals_torchvision_one_image_at_a_time(seed, size):
    views = ViewSettings(local_crops_number=1, solarize_prob=(0.5, 0.2, 0.5), hue=0.5, blur_prob=(0.5, 0.5, 0.5))
    plan = plan_views(views, seed, 0, np.arange(12), np.full((12, 2), size))
    for view in range(3):
        parameters, images = color_of(plan, slice(view, view + 1)), pictures(12, size, seed % 1000)
        out = color(images, parameters)
        for k in range(12):
            wanted = expected(images[k], parameters, k)
            if parameters.solarize[k]:  # 1e-7 at the threshold flips a pixel: compare those away from it
                unsolarized = color(images, Color(**{**parameters.__dict__, "solarize": torch.zeros(12) > 0}))[k]
                away = (unsolarized - 128 / 255).abs() > 1e-4
                torch.testing.assert_close(out[k][away], wanted[away], rtol=1e-5, atol=1e-5)
            else:
                torch.testing.assert_close(out[k], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", range(4))
def test_each_adjustment_alone_equals_torchvision(op):
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(12, 1)
    factors[:, op] = torch.linspace(-0.5, 0.5, 12) if op == 3 else torch.linspace(0, 2, 12)
    plan = plain(12, jitter=torch.ones(12, dtype=torch.bool), factors=factors)
    out = color(pictures(), plan)
    for k in range(12):
        torch.testing.assert_close(out[k], expected(pictures()[k], plan, k), rtol=1e-5, atol=2e-6)


def test_hue_equals_the_textbook_conversion():
    """colorsys in float64, pixel by pixel."""
    import colorsys

    x = pictures(5, 6).double() / 255
    turns = torch.tensor([0.1, -0.5, 0.5, -0.2, 0.03], dtype=torch.float64)
    out = shift_hue(x.clone(), turns)
    for k in range(5):
        for pixel, result in zip(x[k].flatten(1).T.tolist(), out[k].flatten(1).T.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert result == pytest.approx(colorsys.hsv_to_rgb((h + turns[k].item()) % 1, s, v), abs=1e-6)


def test_blur_is_a_gaussian_in_float64():
    x = pictures(6, 24).double() / 255
    sigma = torch.tensor([0.1, 0.4, 0.9, 1.3, 1.7, 2.0], dtype=torch.float64)
    out = blur(x, sigma)
    for k in range(6):
        wanted = x[k].numpy()
        for axis in (1, 2):
            wanted = gaussian_filter1d(
                wanted, sigma[k].item(), axis, mode="mirror", radius=int(np.ceil(3 * sigma[k].item()))
            )
        np.testing.assert_allclose(out[k].numpy(), wanted, atol=1e-12)


def test_blur_of_one_image_does_not_depend_on_the_others():
    x, sigma = pictures(4, 16).float() / 255, torch.tensor([0.3, 2.0, 1.0, 0.1])
    torch.testing.assert_close(blur(x, sigma)[0], blur(x[:1], sigma[:1])[0])


def test_blur_looks_like_pillows():
    from PIL import ImageFilter

    image = Image.fromarray(
        np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((6, 6, 1))).astype("u1")
    )
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5))).astype(float)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    ours = blur(x, torch.tensor([1.5]))[0].permute(1, 2, 0).numpy() * 255
    inside = slice(6, -6)
    assert np.abs(ours - theirs)[inside, inside].max() < 6  # Pillow's is itself an approximation by boxes


def test_solarize_equals_pillow_exactly():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    out = color(images, plain(1, solarize=torch.tensor([True])))
    theirs = ImageOps.solarize(Image.fromarray(images[0].permute(1, 2, 0).numpy()), 128)
    np.testing.assert_array_equal((out[0].permute(1, 2, 0) * 255).round().byte().numpy(), np.asarray(theirs))
    assert torch.equal(color(images, plain(1, solarize=torch.tensor([True]), solarize_threshold=256)), images / 255)


def test_untouched_samples_stay_exactly_as_they_are():
    images = pictures()
    some = torch.arange(12) % 2 == 0
    out = color(images, plain(12, gray=some, sigma=some * 1.0, jitter=some))
    assert torch.equal(out[1::2], images[1::2].float() / 255)


def test_order_of_operations_matters_and_is_kept():
    images, n = pictures()[4:6], 2
    factors = torch.tensor([[1.4, 0.6, 1.0, 0.0]] * 2)
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]], dtype=torch.uint8)
    plan = plain(n, jitter=torch.ones(n, dtype=torch.bool), factors=factors, order=order)
    images[1] = images[0]
    out = color(images, plan)
    assert not torch.allclose(out[0], out[1])
    for k in range(n):
        torch.testing.assert_close(out[k], expected(images[k], plan, k))


def test_working_in_parts_changes_nothing(monkeypatch):
    views = ViewSettings(local_crops_number=0)
    plan = color_of(plan_views(views, 0, 0, np.arange(12), np.full((12, 2), 20)), slice(0, 1))
    whole = color(pictures(), plan)
    monkeypatch.setattr(colors, "_CACHE", 5 * 4 * 3 * 20 * 20)  # 5 + 5 + 2 images
    torch.testing.assert_close(color(pictures(), plan), whole, rtol=0, atol=1e-6)


def test_parameters_of_a_group_run_view_by_view():
    plan = plan_views(ViewSettings(local_crops_number=3), 0, 0, np.arange(4), np.full((4, 2), 20))
    group = color_of(plan, slice(2, 5))
    assert group.sigma.tolist() == [plan.sigma[n, v] for v in range(2, 5) for n in range(4)]
    assert torch.equal(group.factors[4 * 1 + 2], torch.from_numpy(plan.factors[2, 3]))


def test_one_pixel_no_images_and_gray():
    one = color(torch.full((1, 3, 1, 1), 9, dtype=torch.uint8), plain(1, sigma=torch.ones(1)))
    assert one.flatten().tolist() == pytest.approx([9 / 255] * 3)
    assert color(pictures()[:0], plain(0)).shape == (0, 3, 20, 20)
    assert gray(torch.ones(1, 3, 2, 2)).mean() == pytest.approx(0.9999)  # as torchvision's


@pytest.mark.cuda
def test_the_gpu_gives_the_same():
    plan = plan_views(ViewSettings(), 0, 0, np.arange(12), np.full((12, 2), 20))
    for view in range(3):
        group = color_of(plan, slice(view, view + 1))
        group = Color(**{**group.__dict__, "solarize": torch.zeros(12) > 0})
        there = color(pictures().cuda(), group).cpu()
        torch.testing.assert_close(there, color(pictures(), group), rtol=1e-5, atol=1e-5)
