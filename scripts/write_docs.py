"""Write the files that are generated from the code, or check that they are up to date."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import click
import cloup
import msgspec

from consolidate.cli import cli
from consolidate.results import RESULTS
from scripts.option_pages import api_source, options_page
from scripts.python_page import python_page

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 96


def help_texts(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Yield the full name and the help text of a command, then of the commands below it."""
    context = cloup.Context(
        command, info_name=name, terminal_width=WIDTH, color=False, **cli.context_settings
    )
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from help_texts(found, f"{name} {below}")


def command_line() -> str:
    """Return the page of the commands."""
    parts = [
        "# Command line\n",
        "The `--help` of every command, written by `scripts/write_docs`.\n",
    ]
    for name, text in help_texts(cli, "consolidate"):
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append(f"## {name}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def json_schema() -> str:
    """Return the JSON Schema of what `--json` writes, made from the types of the results."""
    parts = {
        name: get_args(kind) if isinstance(kind, UnionType) else (kind,)
        for name, kind in RESULTS.items()
    }
    every = [kind for kinds in parts.values() for kind in kinds]
    found, definitions = msgspec.json.schema_components(every, ref_template="#/$defs/{name}")
    schemas = iter(found)
    commands = {}
    for name, kinds in parts.items():
        ways = [next(schemas) for _ in kinds]
        commands[name] = ways[0] if len(ways) == 1 else {"anyOf": ways}
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What consolidate prints with --json",
        "description": "One object. $defs has one schema for each command, and one for a command "
        "that failed. A later version may add fields; the present ones stay. Numbers that are not "
        "finite are null.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in commands],
        "$defs": commands | dict(sorted(definitions.items())),
    }
    schema = json.loads(json.dumps(whole), object_hook=_complete)
    return _laid_out(schema) + "\n"


def _complete(schema: dict[str, Any]) -> dict[str, Any]:
    """Add what the types cannot say: no other fields, and null for what is not finite."""
    if schema.get("type") == "object" and "properties" in schema:
        schema["additionalProperties"] = False
    if schema.pop("or null", False):
        schema["type"] = [schema["type"], "null"]
    return schema


def _laid_out(value: Any, margin: str = "") -> str:
    """Write JSON, on one line what fits there."""
    short = json.dumps(value, ensure_ascii=False)
    if len(margin) + len(short) <= WIDTH or not isinstance(value, dict | list):
        return short
    inner = f"{margin}  "
    if isinstance(value, dict):
        lines = [f"{json.dumps(k)}: {_laid_out(v, inner)}" for k, v in value.items()]
    else:
        lines = [_laid_out(entry, inner) for entry in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n" + ",\n".join(inner + line for line in lines) + f"\n{margin}{end}"


PAGES = {
    "consolidate/api.py": api_source,  # the first, as the page of Python imports it
    "docs/reference/cli.md": command_line,
    "docs/reference/json-schema.json": json_schema,
    "docs/reference/options.md": options_page,
    "docs/reference/python.md": python_page,
}


def run(arguments: list[str]) -> int:
    """Write the files, or with --check only compare them; return the exit code."""
    if arguments not in ([], ["--check"]):
        print("Usage: scripts/write_docs [--check]", file=sys.stderr)
        return 2
    code = 0
    for name, write in PAGES.items():
        path, text = ROOT / name, write()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if arguments:
            print(f"{name} is not up to date: run scripts/write_docs", file=sys.stderr)
            code = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"Wrote {path}")
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
