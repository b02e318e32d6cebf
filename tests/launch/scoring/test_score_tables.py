"""What the tables on the console say of scores."""

from __future__ import annotations

from rich.console import Console

from nearfar.eval.results import DataName, Score
from nearfar.launch.scoring.score_tables import detail_tables


def test_no_change_has_no_sign_of_a_loss() -> None:
    name = DataName("images", "f", 50)
    rows = {
        "clean": (40.0, 0.0),
        "mirrored": (40.0, 0.0),
        "blur": (39.98, 0.02),
        "dark": (30.0, 10.0),
        "up": (42.5, -2.5),
    }
    table = {key: {"top1": top1, "drop": drop} for key, (top1, drop) in rows.items()}
    score = Score("trained", "robustness", 40.0, "w", name, name, {}, 1, {"table": table})
    console = Console(width=100)
    with console.capture() as captured:
        for each in detail_tables([score]):
            console.print(each)
    text = captured.get()
    assert "-0.0" not in text and text.count("40.0 (+0.0)") == 2
    assert "30.0 (-10.0)" in text and "42.5 (+2.5)" in text
