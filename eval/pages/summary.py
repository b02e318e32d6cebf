"""What comes first on the page of a run: what was trained on what, for how long, and how good it is."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nearfar.eval.pages.curves import number
from nearfar.eval.pages.page import folded, missing, section, soft
from nearfar.eval.pages.verdict import Verdict
from nearfar.eval.results import SUBJECTS, TITLES, Score, signed
from nearfar.ssl.wording import duration

Table = Mapping[str, Mapping[str, Score]]  # of one pair of data sets: {subject: {task: score}}
_EXPLAINED = {
    "start": "what this run began with",
    "untrained": "same network, same seed, no training",
    "pixels": "no network",
}


def summary(
    name: str,
    settings: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    tables: Sequence[Table],
    judged: Verdict | None,
) -> str:
    """The top of the page as HTML."""
    facts = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in _facts(settings, metrics)
    )
    sentence = ""
    if judged:
        rest = f"{judged.others} {judged.advice}".strip()
        kind = "verdict" if judged.good else "verdict bad"
        sentence = f'<p class="{kind}"><b>{html.escape(judged.finding)}</b> {html.escape(rest)}</p>'
    lede = html.escape(_lede(settings, metrics, tables[0] if tables else {}))
    bars = _bars(tables[0]) if tables else ""
    return (
        f'<header><div class="soft">nearfar run</div><h1>{html.escape(name)}</h1><p class="lede">{lede}</p>'
        f"{bars}{sentence}<dl>{facts}</dl></header>"
    )


def _lede(settings: Mapping[str, Any], metrics: Sequence[Mapping[str, float]], table: Table) -> str:
    """One sentence: what was trained on what, and for how long."""
    data, train = part(settings, "data"), part(settings, "train")
    what = _backbone(settings) or "A network"
    score = next((score for scores in table.values() for score in scores.values()), None)
    on = ""
    if data.get("path"):
        known = score is not None and score.train.path == data["path"]
        count = f"{score.train.images:,} images, " if known and score else ""
        on = f" on {count}{data['path']}"
    logged = [line for line in metrics if "loss" in line]
    if not logged:
        return f"{what}, pretrained without labels{on}."
    last = logged[-1]
    epochs = f"{last['epoch']:.3g}" if "epoch" in last else ""
    length = f" for {epochs} epoch{'s' * (epochs != '1')} ({last['step']:,.0f} steps)" if epochs else ""
    took = ""
    if isinstance(train.get("batch_size"), int) and (seconds := _seconds(logged, train["batch_size"])):
        took = f", in {duration(seconds)}"
    return f"{what}, pretrained without labels{on}{length}{took}."


def _bars(table: Table) -> str:
    """A small bar chart for each task, on one scale from 0 to 100 %."""
    blocks = []
    for task, title in TITLES.items():
        rows = []
        for subject, scores in table.items():
            if task in scores:
                percent = scores[task].percent
                width = min(max(percent, 0.0), 100.0)
                rows.append(
                    f'<div class="bar {subject}"><span>{SUBJECTS[subject]}</span><span class="track">'
                    f'<i style="width:{width:.1f}%"></i></span><span>{percent:.1f}</span></div>'
                )
        if rows:
            blocks.append(f"<div><b>{html.escape(title)}, %</b>{''.join(rows)}</div>")
    return f'<div class="bars">{"".join(blocks)}</div>'


def _backbone(settings: Mapping[str, Any]) -> str:
    backbone = part(settings, "backbone")
    if not backbone.get("name"):
        return ""
    switches = [label for key, label in (("lgp", "LGP"), ("gaug", "GAug"), ("prr", "PRR")) if backbone.get(key)]
    return " + ".join([str(backbone["name"]), *switches])


def _facts(settings: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    train = part(settings, "train")
    logged = [line for line in metrics if "loss" in line]
    if logged:
        last = logged[-1]
        of = f" of {train['epochs']}" if "epochs" in train else ""
        yield "Steps", f"{last['step']:,.0f}"
        if "epoch" in last:
            yield "Epochs", f"{last['epoch']:.4g}{of}"
        yield "Loss", f"{number(logged[0]['loss'])} \u2192 {number(last['loss'])}"
        speeds = sorted(line["img_per_s"] for line in logged if "img_per_s" in line)
        if speeds:
            yield "Images per second", f"{number(speeds[len(speeds) // 2])} (median)"
        if isinstance(train.get("batch_size"), int) and (seconds := _seconds(logged, train["batch_size"])):
            yield "Time in training", duration(seconds)
    if "seed" in train:
        yield "Seed", str(train["seed"])


def _seconds(logged: Sequence[Mapping[str, float]], batch_size: int) -> float:
    """From steps and speeds, not from the clock: a run may have been stopped and continued."""
    total, before = 0.0, 0.0
    for line in logged:
        if line.get("img_per_s"):
            total += (line["step"] - before) * batch_size / line["img_per_s"]
        before = line["step"]
    return total


def scores_section(tables: Sequence[Table], scores: Sequence[Score]) -> str:
    """Every score, a table for each pair of data sets."""
    if not tables:
        return section(
            "Frozen features",
            missing("There are no scores yet: `nearfar eval all RUN --baselines` writes results.json."),
        )
    intro = soft("In percent; the best of each column is bold.")
    return section("Frozen features", intro + "".join(_table(table) for table in tables) + _every_score(scores))


def _table(table: Table) -> str:
    """The scores on one pair of data sets, and how far training is above the other rows."""
    tasks = [task for task in TITLES if any(task in scores for scores in table.values())]
    percent = {subject: {task: each.percent for task, each in scores.items()} for subject, scores in table.items()}
    best = {task: max(round(scores[task], 1) for scores in percent.values() if task in scores) for task in tasks}

    def cell(value: float | None, task: str) -> str:
        mark = ' class="best"' if value is not None and round(value, 1) == best[task] else ""
        return "<td>&ndash;</td>" if value is None else f"<td{mark}>{value:.1f}</td>"

    rows = []
    for subject, scores in percent.items():
        small = f"<small>{_EXPLAINED[subject]}</small>" if subject in _EXPLAINED else ""
        cells = "".join(cell(scores.get(task), task) for task in tasks)
        rows.append(f'<tr><th scope="row">{SUBJECTS[subject].capitalize()}{small}</th>{cells}</tr>')
    for other in ("start", "untrained", "pixels"):
        if "trained" in percent and other in percent:
            differences = "".join(
                f"<td>{signed(percent['trained'][task] - percent[other][task])}</td>"
                if task in percent["trained"] and task in percent[other]
                else "<td>&ndash;</td>"
                for task in tasks
            )
            against = f"Trained &minus; {SUBJECTS[other]}"
            rows.append(f'<tr class="difference"><th scope="row">{against}</th>{differences}</tr>')
    heads = "".join(f'<th scope="col">{html.escape(TITLES[task])}</th>' for task in tasks)
    one = next(iter(next(iter(table.values())).values()))
    data = (
        f"<h3>learned from {html.escape(one.train.path)} ({one.train.images:,} images), scored on "
        f"{html.escape(one.val.path)} ({one.val.images:,})</h3>"
    )
    return (
        f'{data}<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _every_score(scores: Sequence[Score]) -> str:
    """All entries of results.json with what they read: those of earlier weights and of other readings too."""
    rows = []
    for each in scores:
        reading = ", ".join(f"{key} {value}" for key, value in each.reading.items() if value is not None)
        step = "" if each.step is None else f"{each.step:,}"
        cells = (SUBJECTS[each.subject], step, TITLES[each.task], f"{each.percent:.1f}", each.val.path, reading)
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{title}</th>" for title in ("features", "step", "score", "%", "scored on", "read as"))
    return folded(
        f"All {len(scores)} scores",
        f'<div class="scroll"><table class="text"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>",
    )


def part(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """One section of the settings; {} for anything else."""
    found = settings.get(key)
    return found if isinstance(found, dict) else {}
