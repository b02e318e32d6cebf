"""Puts pictures of the demo's report side by side for the README: `python docs/figures/demo.py runs/demo`."""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nearfar.eval.pictures import figures
from nearfar.eval.pictures.figures import Cell, Figure, Group

HERE = Path(__file__).resolve().parent
SIDE, GAP, WIDE, TOP = 70, 4, 18, 42  # pixels
INK, SOFT, RIGHT, WRONG = "#1b2330", "#5b6675", "#1a7f4b", "#c2410c"
PAPER = "#ffffff"


def cell(sheet: Image.Image, content: Cell, at: tuple[int, int]) -> None:
    """A picture with the border and the symbol of its mark."""
    picture = Image.open(BytesIO(content.image)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet.paste(picture, at, picture)
    if not content.mark:
        return
    color, draw = RIGHT if content.mark == "right" else WRONG, ImageDraw.Draw(sheet)
    x, y = at
    draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=color, width=3)
    draw.rectangle((x + SIDE - 17, y + SIDE - 17, x + SIDE - 1, y + SIDE - 1), fill=color)
    left, top = x + SIDE - 13, y + SIDE - 13
    if content.mark == "right":
        draw.line([(left, top + 5), (left + 3, top + 8), (left + 9, top + 1)], PAPER, 2)
    else:
        draw.line([(left + 1, top + 1), (left + 8, top + 8)], PAPER, 2)
        draw.line([(left + 8, top + 1), (left + 1, top + 8)], PAPER, 2)


def rows(drawn: dict[str, Figure]) -> list[list[list[Cell]]]:
    """For each of six images its cells, in blocks: query, trained, pixels; image with masks, attention, tokens."""
    found = []
    named = (drawn[key].groups for key in ("neighbors", "masks", "attention", "tokens"))
    for near, masks, attention, tokens in zip(*named, strict=True):
        trained, pixels = (list(cells) for _, cells in near.strips)
        found.append([[near.lead], trained, pixels, [*first(masks), first(attention)[0], first(tokens)[1]]])
    return found  # type: ignore[return-value]


def first(group: Group) -> list[Cell]:
    return list(group.strips[0][1])


def draw(drawn: dict[str, Figure]) -> Image.Image:
    table = rows(drawn)
    widths = [len(block) for block in table[0]]
    width = sum(widths) * (SIDE + GAP) - GAP * len(widths) + WIDE * (len(widths) - 1)
    sheet = Image.new("RGB", (width, TOP + len(table) * (SIDE + GAP) - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    bold, plain = (ImageFont.load_default(size) for size in (15, 12))
    titles = [["query"], ["nearest by trained features"], ["nearest by raw pixels"]]
    titles.append(["image", "mask", "predicted", "attention", "tokens"])
    x = 0
    for block, count in enumerate(widths):
        for at, title in enumerate(titles[block]):
            pen.text((x + at * (SIDE + GAP), 14), title, INK, bold if count == 5 and len(titles[block]) == 1 else plain)
        for number, row in enumerate(table):
            for at, content in enumerate(row[block]):
                cell(sheet, content, (x + at * (SIDE + GAP), TOP + number * (SIDE + GAP)))
        x += count * (SIDE + GAP) - GAP + WIDE
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run with labels and masks whose report has been written")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo.png", help="picture to write")
    arguments = parser.parse_args()
    drawn = {figure.key: figure for figure in figures.read(arguments.run / figures.FILE)}
    fewer = draw(drawn).point(lambda value: round(value * 31 / 255) * 255 // 31)  # 32 levels: half the bytes
    fewer.save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
