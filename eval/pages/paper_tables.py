"""The comparison of runs as tables that can be pasted into a paper: Markdown and LaTeX."""

from __future__ import annotations

from nearfar.eval.pages.compare import Comparison
from nearfar.eval.pages.seed_tables import SeedTable, detail_tables, score_table
from nearfar.eval.pages.seeds import by_seed, repeated_seeds

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u00b1": r"$\pm$", "\u2013": "--",
}  # fmt: skip


def markdown(found: Comparison) -> str:
    """Markdown tables, the best means of the scores bold, with what each is made of below it."""
    return "\n\n".join(f"{_markdown(table)}\n\n{note}" for table, note in _tables(found))


def latex(found: Comparison) -> str:
    """LaTeX tabulars (package booktabs), the best means of the scores bold, with what each is made of as a comment."""
    return "\n\n".join([r"% \usepackage{booktabs}", *(f"{_latex(table)}\n% {note}" for table, note in _tables(found))])


def _tables(found: Comparison) -> list[tuple[SeedTable, str]]:
    """Every table with its note; what is to be known of the runs is said below the first."""
    groups = by_seed(found)
    scores = score_table(found)
    notes = [scores.note, *(" ".join(note.split()) for note in [*found.notes, *repeated_seeds(groups)])]
    return [(scores, " ".join(notes)), *((table, table.note) for table in detail_tables(groups))]


def _markdown(table: SeedTable) -> str:
    def line(cells: list[str]) -> str:
        escaped = (cell.replace("|", "\\|") for cell in cells)
        return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in escaped)}|"

    rows = _emphasized(table, table.rows, "**{}**")
    return "\n".join([line(table.heads), "|---" * len(table.heads) + "|", *map(line, rows)])


def _latex(table: SeedTable) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    head, *rows = [[_escaped(cell) for cell in row] for row in (table.heads, *table.rows)]
    begin = rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}"
    lines = [line(row) for row in _emphasized(table, rows, r"\textbf{{{}}}")]
    return "\n".join([begin, r"\toprule", line(head), r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"])


def _emphasized(table: SeedTable, rows: list[list[str]], pattern: str) -> list[list[str]]:
    """The rows with the best cells of the table put into `pattern`."""
    return [
        [pattern.format(cell) if (at, column) in table.best else cell for column, cell in enumerate(row)]
        for at, row in enumerate(rows)
    ]


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
