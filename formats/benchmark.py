"""How a benchmark is named: `lm-eval:TASK`, a task of EleutherAI's evaluation harness."""

from pathlib import Path

PREFIX = "lm-eval:"


def benchmark_task(data: object) -> str | None:
    """Return TASK of ``lm-eval:TASK``; None for other data."""
    text = str(data)
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def is_task_file(task: str) -> bool:
    """Return whether TASK is the path of a task file, and not the name of one of its own tasks."""
    return Path(task).suffix.lower() in (".yaml", ".yml")


def data_name(data: str | Path) -> str:
    """Name data after their file, or a benchmark after its task."""
    return Path(benchmark_task(data) or data).stem
