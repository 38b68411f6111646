"""The directions in which modules may import each other, read from their source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORMATS = sorted((ROOT / "formats").rglob("*.py"))
CONSOLIDATE = sorted((ROOT / "consolidate").rglob("*.py"))
MODULES = FORMATS + CONSOLIDATE

EXTRAS = {"transformers", "tokenizers", "datasets", "pyarrow", "pandas", "PIL", "matplotlib"}
EXTRAS |= {"peft", "mlflow", "torchvision", "sklearn"}
CORE = {"torch", "numpy", "safetensors", "huggingface_hub"}

COMMAND_LINE = {"cli", "options", "training_options"}

# Modules that take and return tensors.
NUMERICAL = {"estimation", "ewc", "training"}
INPUT_OUTPUT = {"os", "io", "pathlib", "json", "shutil", "tempfile", "subprocess", "socket"}
INPUT_OUTPUT |= {"logging", "pickle", "safetensors", "huggingface_hub", "click", "tqdm", "urllib"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Full names of what a module imports; `if TYPE_CHECKING:` does not count."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if typing or (function and not inside_functions):
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))


def packages(path: Path, *, inside_functions: bool = True) -> set[str]:
    found = imports(path, inside_functions=inside_functions)
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("path", FORMATS, ids=name_of)
def test_formats_knows_nothing_of_consolidate(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | CORE | {"formats"}
    assert packages(path, inside_functions=False) <= allowed
    assert packages(path) <= allowed | {"pyarrow", "PIL", "datasets"}


def test_the_init_of_formats_is_its_docstring() -> None:
    body = ast.parse((ROOT / "formats" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("path", CONSOLIDATE, ids=name_of)
def test_extras_are_imported_only_where_they_are_used(path: Path) -> None:
    assert not packages(path, inside_functions=False) & EXTRAS


@pytest.mark.parametrize("path", CONSOLIDATE, ids=name_of)
def test_only_the_command_line_knows_click(path: Path) -> None:
    if path.stem not in COMMAND_LINE:
        assert "click" not in packages(path)


@pytest.mark.parametrize(
    "path",
    [path for path in CONSOLIDATE if path.parent.name in NUMERICAL and path.stem != "forgetting"],
    ids=name_of,
)
def test_numerical_modules_do_no_input_or_output(path: Path) -> None:
    assert not packages(path) & INPUT_OUTPUT
    ours = {name for name in imports(path) if name.startswith("formats.")}
    assert all(name.startswith("formats.errors") for name in ours)
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}


def test_modules_do_not_import_each_other_in_circles() -> None:
    known = {name_of(path): path for path in MODULES}
    graph = {
        name: {other for other in imports(path, inside_functions=False) if other in known} - {name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_help_imports_nothing_heavy() -> None:
    heavy = sorted(CORE | EXTRAS)
    script = (
        "import sys, click\n"
        "from consolidate.cli import cli\n"
        "for words in [[], *([name] for name in cli.commands)]:\n"
        "    cli([*words, '--help'], standalone_mode=False)\n"
        f"print(sorted(set({heavy!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
