"""The page of the Python interface, from the signatures and docstrings of the public names."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import consolidate
from consolidate import ConsolidateError
from scripts.option_pages import table

WIDTH = 96
INTRODUCTION = """# Python

Every public name of the package `consolidate`, written by `scripts/write_docs` from signatures and
docstrings: `help(consolidate.finetune)` prints the same. The keywords of a command are
[the options](options.md) of its command line. Other modules may change without notice.
"""
ERRORS = """## Errors

All are subclasses of `ConsolidateError`. The command line exits with the code of the error, as
listed in [exit codes](exit-codes.md).
"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def python_page() -> str:
    """Return docs/reference/python.md."""
    found: dict[str, Any] = {name: getattr(consolidate, name) for name in consolidate.__all__}
    errors = {
        n: o for n, o in found.items() if inspect.isclass(o) and issubclass(o, ConsolidateError)
    }
    commands = {n: o for n, o in found.items() if o.__module__ == "consolidate.api"}
    others = {n: o for n, o in found.items() if n not in errors and n not in commands}
    parts = [INTRODUCTION]
    for title, names in (("Commands", commands), ("Modules and tensors", others)):
        rows = [[f"[`{name}`](#{name.lower()})", _summary(it)] for name, it in names.items()]
        parts += [f"## {title}\n", table(["name", "what it does"], rows)]
        parts += [part for name, it in names.items() for part in _entry(name, it, "###")]
    rows = [[f"`{n}`", str(error.exit_code), _summary(error)] for n, error in errors.items()]
    parts.append(ERRORS)
    parts.append(table(["error", "exit code", "when"], rows))
    return "\n".join(parts)


def _summary(it: Any) -> str:
    return _markup(" ".join((inspect.getdoc(it) or "").split("\n\n")[0].split()))


def _entry(name: str, it: Any, level: str) -> Iterator[str]:
    """Yield the parts of one name: heading, signature, docstring; of a class, its methods."""
    yield f"{level} `{name}`\n"
    text = inspect.getdoc(it) or ""
    if not inspect.isclass(it):
        yield _code(_signature(it, name, method="." in name))
        yield from _prose(text)
        return
    text, attributes, about = text.partition("\nAttributes:\n")
    if not is_dataclass(it):
        yield _code(_signature(it.__init__, name, method=True))
    elif not attributes:
        yield _code(_call(name, _fields(it), ")"))
    yield from _prose(text)
    if not is_dataclass(it):
        yield from _prose(inspect.getdoc(it.__init__) or "")
    yield from _prose(attributes + about)
    ours = [kind for kind in reversed(it.__mro__) if kind.__module__.startswith("consolidate.")]
    for own, member in {own: m for kind in ours for own, m in vars(kind).items()}.items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and not own.startswith("_"):
            yield from _entry(f"{name}.{own}", function, f"{level}#")


def _fields(record: type) -> list[str]:
    """Write the fields of a dataclass that has a default for each."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(tree, ast.ClassDef)
    kinds = {
        ast.unparse(node.target): ast.unparse(node.annotation)
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
    }
    found = inspect.signature(record).parameters
    return [f"{name}: {kinds[name]} = {field.default!r}" for name, field in found.items()]


def _signature(function: Callable[..., Any], name: str, *, method: bool = False) -> str:
    """Write a signature as its source has it, without `self` or `cls`."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    given = tree.args
    plain = given.posonlyargs + given.args
    blank = [None] * (len(plain) - len(given.defaults))
    parts = [_parameter(*pair) for pair in zip(plain, [*blank, *given.defaults], strict=True)][
        method:
    ]
    if given.vararg:
        parts.append("*" + _parameter(given.vararg, None))
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_parameter(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    returned = tree.returns and ast.unparse(tree.returns).strip("'")
    return _call(name, parts, f") -> {returned}" if returned and returned != "None" else ")")


def _call(name: str, parts: list[str], end: str) -> str:
    whole = f"{name}({', '.join(parts)}{end}"
    if len(whole) <= WIDTH:
        return whole
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + end


def _parameter(parameter: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(parameter.annotation)}" if parameter.annotation else ""
    value = ast.unparse(default).replace("'", '"') if default else ""
    return f"{parameter.arg}{kind}" + (f" = {value}" if value else "")


def _code(text: str, language: str = "py") -> str:
    return f"```{language}\n{text}\n```\n"


def _prose(docstring: str) -> Iterator[str]:
    """Yield a docstring as Markdown: paragraphs, blocks, and a list for each section."""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n", docstring, flags=re.MULTILINE)
    yield from _paragraphs(pieces[0])
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        text = textwrap.dedent(body)
        entries = re.split(r"\n(?=\S)", text.strip("\n"))
        if title == "Returns":
            yield f"**Returns**\n\n{_filled(_markup(' '.join(text.split())))}\n"
            continue
        heading = "Arguments" if title == "Args" else title
        lines = []
        for entry in entries:
            whole = re.sub(r"(\w-)\n\s+(?=\w)", r"\1", entry)  # a word that was cut at its hyphen
            name, _, meaning = " ".join(whole.split()).partition(": ")
            lines.append(_filled(f"- `{name}`: {_markup(meaning)}", "  "))
        yield f"**{heading}**\n\n" + "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    code = False
    for paragraph in filter(str.strip, text.split("\n\n")):
        if paragraph.startswith("    "):
            block = textwrap.dedent(paragraph).rstrip()
            yield _code(block.replace("…", "...")) if code else _code(block, "text")
            continue
        code = paragraph.rstrip().endswith("::")
        flat = " ".join(paragraph.split())
        yield _filled(_markup(flat.removesuffix(":") if code else flat)) + "\n"


def _markup(text: str) -> str:
    return text.replace("``", "`")


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
