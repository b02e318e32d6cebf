"""What a run says when it goes on otherwise than it was begun."""

from __future__ import annotations

from nearfar.ssl import config
from nearfar.ssl.announce import changed_versions, continued_otherwise


def test_only_what_differs_is_said() -> None:
    run = config.load(None, ["name=r", "train.world_size=2", "backbone.drop_path=0.1"])
    still = config.load(None, ["name=r", "train.world_size=2", "backbone.drop_path=0"])
    assert continued_otherwise({"world_size": 2, "precision": "float32"}, run, "float32") == []
    (ranks,) = continued_otherwise({"world_size": 1, "precision": "float32"}, run, "float32")
    assert "Saved by 1 ranks, continued by 2" in ranks and "drop-path draws others" in ranks
    (ranks,) = continued_otherwise({"world_size": 1}, still, "float32")
    assert "drop-path" not in ranks
    (precision,) = continued_otherwise({"world_size": 2, "precision": "bf16 autocast"}, run, "float32")
    assert "Saved in bf16 autocast, continued in float32" in precision


def test_another_torch_or_cuda_is_told() -> None:
    now = {"torch": "2.13.0", "cuda": "13.0", "python": "3.11.7"}
    assert changed_versions({"versions": dict(now)}, now) == [] == changed_versions({}, now)
    (said,) = changed_versions({"versions": {**now, "torch": "2.12.1", "cuda": "12.8"}}, now)
    assert "torch 2.12.1 -> 2.13.0, cuda 12.8 -> 13.0" in said and "python" not in said
