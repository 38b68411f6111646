"""The paper's experiments, and the table that sets all of them beside what was published."""

import re
from collections.abc import Sequence
from pathlib import Path

import fisher_overlap
import many_tasks
import published_tables
import random_patterns
import three_tasks
import weight_noise
import which_fisher
from records import Experiment, Row
from sittings import ROOT, main

EXPERIMENTS = (
    random_patterns.EXPERIMENT,
    fisher_overlap.EXPERIMENT,
    weight_noise.EXPERIMENT,
    three_tasks.EXPERIMENT,
    which_fisher.EXPERIMENT,
    many_tasks.EXPERIMENT,
    published_tables.EXPERIMENT,
)
SCALING = ROOT / "docs" / "results" / "fisher-scaling.md"
TEXT = """# The paper, reproduced by command

The experiments of Kirkpatrick et al. 2017 and the tables that others have published, by one command
that goes on where it was broken off:

```sh
scripts/experiments/all
```

Each figure beside what the paper or the table says. Differences of accuracies are in points of a
per cent. Everything on this page and on those it leads to is written by the scripts, from the
records in `docs/results/paper/`.{quick}

| | paper or table | here | difference | reason |
| --- | --- | --- | --- | --- |
{table}

{pages}
"""


def write_table(rows: Sequence[tuple[Experiment, list[Row]]], folder: Path, quick: bool) -> None:
    """Write docs/results/paper.md.

    Args:
        rows: The lines of the table, by experiment.
        folder: Of the pages; the table goes beside it.
        quick: Whether the page says that its figures mean nothing.
    """
    lines = [row for _, found in rows for row in found] + run_time()
    pages = [
        f"- [{one.title}](paper/{one.name}.md)"
        if (folder / f"{one.name}.md").exists()
        else f"- {one.title}: not run yet"
        for one, _ in rows
    ]
    text = TEXT.format(
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * quick,
        table="\n".join("| " + " | ".join(row) + " |" for row in lines),
        pages="\n".join(pages),
    )
    (folder.parent / "paper.md").write_text(text, encoding="utf-8")


def run_time(page: Path = SCALING) -> list[Row]:
    """Read the exponents of time against examples and parameters from the page that has them."""
    exponents = {
        name: numbers
        for name, *numbers in re.findall(
            r"^\| consolidate, (\w+) \| ([0-9.]+) \| ([0-9.]+) \|$", page.read_text("utf-8"), re.M
        )
    }
    return [
        Row(
            f"run time: exponent of time against {against}, {name}",
            "1 (linear)", numbers[i], f"{float(numbers[i]) - 1:+.2f}",
            "fixed costs at the small end; [measured](fisher-scaling.md) over two decades"
        )
        for i, against in enumerate(("examples", "parameters"))
        for name, numbers in exponents.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main(*EXPERIMENTS, table=write_table)
