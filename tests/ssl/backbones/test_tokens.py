"""Tokens and padding."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.ssl.backbones import Tokens, pad_to_multiple
from nearfar.ssl.backbones.tokens import check_divides
from nearfar.ssl.errors import UserError


def test_cls_is_the_first_prefix_token_or_the_mean() -> None:
    prefix, patches = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    assert torch.equal(Tokens(prefix, patches, (2, 3)).cls, prefix[:, 0])
    assert torch.equal(Tokens(prefix[:, :0], patches, (2, 3)).cls, patches.mean(1))


def test_map_lays_patches_out_row_by_row() -> None:
    tokens = Tokens(torch.randn(2, 1, 8), torch.randn(2, 6, 8), (2, 3))
    assert tokens.map().shape == (2, 8, 2, 3)
    assert torch.equal(tokens.map()[:, :, 1, 2], tokens.patches[:, 5])


@given(height=st.integers(1, 70), width=st.integers(1, 70), multiple=st.integers(1, 33))
@settings(deadline=None)
def test_padding_adds_the_least_on_the_right_and_bottom(height: int, width: int, multiple: int) -> None:
    images = torch.ones(1, 3, height, width)
    padded = pad_to_multiple(images, multiple)
    assert padded.shape[-2] % multiple == padded.shape[-1] % multiple == 0
    assert padded.shape[-2] - height < multiple
    assert padded.shape[-1] - width < multiple
    assert torch.equal(padded[..., :height, :width], images)
    assert padded.sum() == images.sum()


def test_padding_is_said_once_for_each_size(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for side in (101, 101, 103, 96):
            pad_to_multiple(torch.ones(1, 3, side, side), 16)
    assert [record.getMessage().split(" ")[2] for record in caplog.records] == ["101x101", "103x103"]
    assert "112x112" in caplog.records[0].getMessage()


def test_sides_that_patches_do_not_divide_are_told_with_the_nearest_that_they_do() -> None:
    check_divides(16, 24, 8)
    with pytest.raises(UserError, match=r"20x3 pixels .* patches of 8x8.* Try 16x8\.$"):
        check_divides(20, 3, 8)
