"""Every test draws the same random numbers wherever and after whatever it runs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds the generators that the process shares; a test that draws from one of its own seeds that itself."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
