"""Digests of the code that made a record: what it computes, not how it is worded."""

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLLOWED = ("scripts/experiments/", "consolidate/ewc/")
"""Where imports are followed: what is there decides a result. Other files count alone."""
ESTIMATION = "consolidate/estimation/"
DEFINED = tuple(
    f"{ESTIMATION}{name}.py" for name in ("covered_layers", "definition", "likelihoods")
)
"""What a Fisher is: its definition, log p and the drawn outcomes, and which layers have a matrix.

The other files of ESTIMATION compute just that, which tests check in float64, and do not count.
"""
MESSAGES = {"warn", "print", "exit", "debug", "info", "warning", "error", "note"}
"""What is called by such a name, or by one of an error or a warning, gets texts to be read."""


class _Meaning(ast.NodeTransformer):
    """Leave out what does not change a result: docstrings, annotations, messages, local names."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Drop a string that stands alone, as docstrings do."""
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Drop a text with a space in it, which is for readers."""
        if isinstance(node.value, str) and " " in node.value:
            node.value = ""
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """Drop an argument's annotation."""
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Drop the annotation of what is returned, and number the local variables."""
        node.returns = None
        taken = {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
        names = [one for part in node.body for one in ast.walk(part) if isinstance(one, ast.Name)]
        local = [one.id for one in names if isinstance(one.ctx, ast.Store) and one.id not in taken]
        numbers = {name: f"local {i}" for i, name in enumerate(dict.fromkeys(local))}
        for one in names:
            one.id = numbers.get(one.id, one.id)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Take a value as if it were assigned without an annotation; keep a field's name."""
        node.annotation = ast.Constant(None)
        if node.value is None:
            return self.generic_visit(node)
        return self.generic_visit(ast.Assign([node.target], node.value))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Drop the arguments of errors and of what prints or warns."""
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in MESSAGES or name.endswith(("Error", "Warning")):
            node.args, node.keywords = [], []
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Drop the text of an assertion."""
        node.msg = None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Drop what an error is raised with."""
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return self.generic_visit(node)


@cache
def meaning(source: str) -> str:
    """Return the syntax tree of a source as text, without what does not change a result."""
    return _written(_Meaning().visit(ast.parse(source)))


def _written(value: object) -> str:
    """Write a tree down; what is empty is left out, so that versions of Python agree."""
    if isinstance(value, ast.AST):
        fields = [
            f"{name}={_written(field)}"
            for name, field in ast.iter_fields(value)
            if field is not None and field != [] and name not in ("type_comment", "kind")
        ]
        return f"{type(value).__name__}({','.join(fields)})"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return repr(value)


@cache
def code_digest(*names: str, root: Path = ROOT) -> str:
    """Return the SHA-256, 16 digits, of files of code and of what they use of this project.

    Args:
        *names: Paths from the root. The files of `consolidate` and `scripts.experiments` that they
            import count too, and through those of FOLLOWED what these import. Of ESTIMATION only
            DEFINED count.
        root: Of the project.
    """
    files = _files(names, root)
    digest = hashlib.sha256()
    for name in sorted(files):
        text = meaning((root / name).read_text(encoding="utf-8"))
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def _files(names: tuple[str, ...], root: Path) -> set[str]:
    """List the files of code, and those that they import, from the root."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        found.add(name)
        for module in _imports((root / name).read_text(encoding="utf-8")):
            path = module.replace(".", "/") + ".py"
            if path.startswith(ESTIMATION):
                found.update(one for one in DEFINED if (root / one).is_file())
            elif path.startswith(FOLLOWED) and (root / path).is_file():
                ahead.append(path)
            elif path.startswith("consolidate/") and (root / path).is_file():
                found.add(path)
    return found


@cache
def _imports(source: str) -> tuple[str, ...]:
    """List the modules that a source imports from, or may."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            if node.module.startswith(("scripts.", "consolidate.")):  # of a package, its modules
                found += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(found)
