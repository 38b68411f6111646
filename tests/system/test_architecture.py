"""The directions in which modules may import each other, read from their source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import consolidate

ROOT = Path(__file__).resolve().parents[2]
FORMATS = sorted((ROOT / "formats").rglob("*.py"))
CONSOLIDATE = sorted((ROOT / "consolidate").rglob("*.py"))
MODULES = FORMATS + CONSOLIDATE

ORDER = "formats < fields < options, results < runtime < estimation, ewc < training < models"
ORDER += " < data < chain < views < commands"
RANKS = {folder: rank for rank, one in enumerate(ORDER.split(" < ")) for folder in one.split(", ")}
NUMERICAL = {"estimation", "ewc", "training"}  # they take and return tensors
FACE = {"__init__", "__main__", "api", "cli", "flags"}  # beside the folders, above all of them
KNOW_CLICK = {"cli", "flags"}
LONGEST_PATH = 15  # modules below the program's first line, each of which imports the next

# Modules without a test file of their name, by what tests them.
TESTED_THROUGH = {
    "chain/test_tasks": "chain.fitted_chain chain.output",
    "commands/test_finetune": "commands.finetune_options commands.finetune_output"
    " commands.finetune_penalty commands.finetune_plan commands.finetune_run"
    " commands.finetune_start commands.finetune_weights",
    "commands/test_run": "commands.run_labels",
    "commands/test_unmeasured": "chain.elsewhere",
    "commands/test_compare_none": "commands.finetune_compare",
    "commands/test_replay": "data.replay",
    "commands/test_generation": "commands.generation_options",
    "commands/test_fisher": "commands.fisher_plan commands.measurement"
    " commands.measurement_report commands.pass_cost runtime.devices",
    "chain/test_heads": "chain.fitted_model commands.evaluate commands.task_metrics",
    "chain/test_module_penalty": "chain.module_fisher",
    "chain/test_resume": "training.state",
    "commands/test_show": "commands.verify views.summary",
    "commands/test_report": "views.page",
    "commands/test_push": "commands.push_files commands.push_repository",
    "commands/test_merge": "commands.merge_blocks commands.merge_plan",
    "commands/test_finetune_search": "commands.finetune_choice",
    "commands/test_forgetting": "commands.finetune_gate training.forgetting",
    "views/test_card": "views.card_text",
    "views/test_figures": "views.search_figures",
    "data/test_benchmarks": "data.benchmark_files data.benchmark_harness benchmark",
    "data/test_generation": "data.prompts data.text_plan",
    "data/test_preprocessing": "data.image_settings",
    "data/test_examples": "data.columns data.encoding data.labels data.tensors data.text_encoding"
    " data.text_examples data.texts",
    "ewc/test_penalty": "ewc.matching",
    "estimation/test_fisher_diagonal": "estimation.batches estimation.estimates",
    "estimation/test_input_blocks": "estimation.covered_layers",
    "estimation/test_layer_rules": "estimation.example_gradients",
    "estimation/test_passes": "estimation.layer_hooks",
    "runtime/test_distributed": "estimation.sharded_passes runtime.torchrun",
    "models/test_loading": "models.architectures models.model models.tensor_names runtime.quiet",
    "formats/test_atomic": "disk_errors locks",
    "formats/test_tensors": "checkpoint_files",
    "formats/test_data": "rows",
    "formats/test_fisher_json": "conversion fields versions wording",
    "system/test_cli": "errors __main__",
    "system/test_json_schema": "results",
    "test_options": "api fields flags options",
    "views/test_mlflow": "views.tracking",
    "views/test_text": "wording",
}

IMPORT_BY_NAME = {"consolidate.models.factories"}  # what the user typed

EXTRAS = {"transformers", "tokenizers", "datasets", "pyarrow", "pandas", "PIL", "matplotlib"}
EXTRAS |= {"peft", "mlflow", "torchvision", "sklearn", "jinja2", "markupsafe", "lm_eval", "wandb"}
CORE = {"torch", "numpy", "safetensors", "huggingface_hub"}
INPUT_OUTPUT = {"os", "io", "pathlib", "json", "shutil", "tempfile", "subprocess", "socket"}
INPUT_OUTPUT |= {"logging", "pickle", "safetensors", "huggingface_hub", "click", "tqdm", "urllib"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(path: Path) -> str:
    """The place in the order above; none for the modules of the command line."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "formats":
        return "formats"
    return parts[1] if len(parts) > 2 else path.stem if path.stem in RANKS else ""


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Full names of what a module imports; `if TYPE_CHECKING:` does not count."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if function and not inside_functions:
            return
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.orelse if typing else ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(parsed(path))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def graph() -> dict[str, set[str]]:
    """The modules of ours that each module imports, inside functions too."""
    known = {name_of(path) for path in MODULES if path.stem != "__init__"}
    return {name_of(path): set(imports(path)) & known - {name_of(path)} for path in MODULES}


def packages(path: Path, *, inside_functions: bool = True) -> set[str]:
    found = imports(path, inside_functions=inside_functions)
    return {name.split(".")[0] for name in found}


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {folder_of(path) for path in MODULES} - {""} == set(RANKS)
    assert {path.stem for path in CONSOLIDATE if not folder_of(path)} == FACE


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_folder_imports_only_what_stands_before_it(path: Path) -> None:
    own = folder_of(path)
    if not own:
        return
    # The package itself leads to every command, and a folder to all its modules.
    for name in imports(path):
        assert name != "consolidate", f"{name_of(path)} imports the whole package"
        assert name.removeprefix("consolidate.") not in consolidate.__all__, f"{path}: {name}"
    if name_of(path) not in IMPORT_BY_NAME:
        assert not {"importlib", "importlib.import_module"} & set(imports(path)), path
        assert "__import__" not in path.read_text(encoding="utf-8"), path
    places = {name_of(other): folder_of(other) for other in MODULES}
    for name in graph()[name_of(path)]:
        folder = places[name]
        assert folder, f"{name_of(path)} imports {name} of the command line"
        assert folder == own or RANKS[folder] < RANKS[own], f"{name_of(path)} imports {name}"


def test_no_folder_bears_the_name_of_a_public_function() -> None:
    # once imported, the folder would stand in the function's place
    assert not set(RANKS) & set(consolidate.__all__)
    assert not {path.stem for path in CONSOLIDATE if not folder_of(path)} & set(consolidate.__all__)


def test_modules_do_not_import_each_other_in_circles_or_in_long_chains() -> None:
    depths: dict[str, int] = {}

    def depth(name: str, trail: tuple[str, ...]) -> int:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in depths:
            below = [depth(other, (*trail, name)) for other in sorted(graph()[name])]
            depths[name] = max(below, default=0) + (name != "consolidate.__main__")
        return depths[name]

    for name in graph():
        depth(name, ())
    assert max(depths.values()) <= LONGEST_PATH


@pytest.mark.parametrize("path", FORMATS, ids=name_of)
def test_formats_knows_nothing_of_consolidate(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | CORE | {"formats", "msgspec"}
    assert packages(path, inside_functions=False) <= allowed
    assert packages(path) <= allowed | {"pyarrow", "PIL", "datasets"}


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.name == "__init__.py" and folder_of(path)],
    ids=name_of,
)
def test_the_init_of_a_folder_is_its_docstring(path: Path) -> None:
    body = parsed(path).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("path", CONSOLIDATE, ids=name_of)
def test_extras_are_imported_only_where_they_are_used(path: Path) -> None:
    assert not packages(path, inside_functions=False) & EXTRAS


@pytest.mark.parametrize("path", CONSOLIDATE, ids=name_of)
def test_only_the_command_line_knows_click(path: Path) -> None:
    if folder_of(path) or path.stem not in KNOW_CLICK:
        assert not {"click", "cloup"} & packages(path)


@pytest.mark.parametrize(
    "path", [path for path in CONSOLIDATE if folder_of(path) in NUMERICAL], ids=name_of
)
def test_numerical_modules_do_no_input_or_output(path: Path) -> None:
    assert not packages(path) & INPUT_OUTPUT
    ours = {name for name in imports(path) if name.startswith("formats.")}
    plain = ("formats.fisher_json", "formats.fisher_json.Block", "formats.fisher_json.ESTIMATORS")
    ours -= set(plain)  # a record and names, without a file
    assert all(name.startswith("formats.errors") for name in ours)
    calls = {
        node.func.id
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}


def test_no_test_module_is_imported_by_another() -> None:
    tests = ROOT / "tests"
    for path in sorted(tests.rglob("*.py")):
        for name in imports(path):
            words = name.split(".")
            assert not any(word.startswith("test_") for word in words[:-1]), f"{path}: {name}"
            assert words[0] != "conftest", f"{path}: {name}"


def test_every_module_has_a_test_file_or_is_said_to_be_tested_through_another() -> None:
    known = {(folder_of(path) or "system", path.stem) for path in MODULES}
    beside = {"commands/test_forgetting", "models/test_tied_weights"}
    beside |= {"commands/test_unmeasured", "commands/test_compare_none"}
    beside |= {"commands/test_lengths", "commands/test_structure", "commands/test_replay"}
    for test in (ROOT / "tests").glob("*/test_*.py"):
        name = f"{test.parent.name}/{test.stem}"
        module = (test.parent.name, test.stem.removeprefix("test_"))
        assert test.parent.name == "system" or module in known or name in beside, name
    without = {
        name_of(path).removeprefix("consolidate.").removeprefix("formats.")
        for path in MODULES
        if path.stem != "__init__"
        and not (ROOT / "tests" / (folder_of(path) or "system") / f"test_{path.stem}.py").is_file()
    }
    assert without == {name for names in TESTED_THROUGH.values() for name in names.split()}
    assert all((ROOT / "tests" / f"{test}.py").is_file() for test in TESTED_THROUGH)


def test_no_script_bears_the_name_of_a_module() -> None:
    scripts = {path.stem for path in (ROOT / "scripts").rglob("*.py")} - {"__init__"}
    assert not scripts & {path.stem for path in MODULES}


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


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Each function's name, its lines without the docstring, and how many parameters it has."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            arguments = node.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            yield node.name, lines, count


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "api"], ids=name_of)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    for name, lines, parameters in functions(path):
        assert lines <= (60 if name in ("fisher", "finetune") else 80), name
        assert parameters <= 12 or name in consolidate.__all__, name
