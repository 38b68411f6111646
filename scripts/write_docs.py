"""Write docs/cli.md from the `--help` of every command, or check that it is current."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from consolidate.cli import cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 96


def help_texts(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Yield the full name and the help text of a command, then of the commands below it."""
    context = click.Context(
        command, info_name=name, terminal_width=WIDTH, color=False, **cli.context_settings
    )
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from help_texts(found, f"{name} {below}")


def document() -> str:
    """Return the whole page."""
    parts = [
        "# Command line\n",
        "What `--help` says of every command, written by `scripts/write_docs`.\n",
    ]
    for name, text in help_texts(cli, "consolidate"):
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append(f"## {name}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def run(arguments: list[str]) -> int:
    """Write the page, or with --check only compare it; return the exit code."""
    if arguments not in ([], ["--check"]):
        print("Usage: scripts/write_docs [--check]", file=sys.stderr)
        return 2
    text = document()
    current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else None
    if current == text:
        return 0
    if arguments:
        print("docs/cli.md is not what --help says: run scripts/write_docs", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print(f"Wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
