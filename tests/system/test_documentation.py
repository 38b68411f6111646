"""README and docs/: their commands and their Python run, their links resolve, cli.md is current.

A page's blocks marked `sh` and `python` run in order, in one folder and one namespace; those marked
`toml` whose first line is `# NAME.toml` are written to that file on the way. The folder
holds what the examples speak of (see `examples`), and nothing is reset between blocks: a command
may use what an earlier one wrote. `<!-- not run: REASON -->` in the line before leaves a block out.
A block marked `text` after `<!-- output -->` is what the commands before it print, but for numbers.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import write_docs
from support import in_process, loopback_hub

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
TOY = DOCS / "how-to" / "README.md"  # makes the folder in which the others run
GENERATED = {DOCS / "reference" / name for name in ("cli.md", "options.md", "python.md")}
RESULTS = {page for page in PAGES if DOCS / "results" in page.parents}
OURS = [page for page in PAGES if page not in GENERATED | RESULTS]  # written by hand
RUN = [page for page in OURS if page != TOY]
BLOCK = re.compile(
    r"^(<!-- not run: [^\n]+ -->\n|<!-- output -->\n)?```(sh|python|toml|text)\n(.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
OF_OTHERS = (  # what peft 0.21 and trl 1.16 call in transformers 5.24
    "`is_gradient_checkpointing` is deprecated",
    "`gradient_checkpointing` is deprecated",
)
NOT_OURS = {
    "accelerate",
    "git",
    "pip",
    "cd",
    "npm",
    "python",
    "torchrun",
}  # what a block may say beside us


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Languages and code; Python is moved down to the lines that it has on the page."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        mark, language, code = block.groups()
        if mark == ("<!-- output -->\n" if language == "text" else None):
            above = text.count("\n", 0, block.start(3)) if language == "python" else 0
            yield language, "\n" * above + code


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the examples.

    Those that the how-to guides start from, made by the block on that page: my-model (a text
    classifier), {old,new,third}-{task,test}.jsonl, topics.jsonl; and the quickstart's: start (a
    network, by `--model network:mlp`) and {a,b}-{train,test}.npz.
    """
    from scripts import quickstart

    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))  # restores what train_start adds too
        quickstart.write_data(folder)
        quickstart.train_start(folder, epochs=1)
        for language, code in blocks(TOY):
            if language == "python":
                exec(compile(code, TOY, "exec"), {})
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return folder


@pytest.fixture
def workspace(examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the current one and which modules are imported from."""
    shutil.copytree(examples, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_shell(block: str, folder: Path, hub: loopback_hub.Hub) -> str:
    """Run a block's commands; return what they write to stdout."""
    printed = []
    variables = loopback_hub.environment(
        folder, HF_ENDPOINT=hub.address, HF_TOKEN=loopback_hub.TOKEN
    )
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is no script of ours"
            continue
        if words[0] in NOT_OURS or words[:2] == ["hf", "auth"] or words[0].startswith(".venv/"):
            continue
        assert words[0] == "consolidate", f"nobody knows how to check: {line}"
        words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
        code, out, err = in_process.consolidate(folder, *words[1:], variables=variables)
        assert code == 0, f"{line}\n{err}"
        if target is None:
            printed.append(out)
        else:
            (folder / target).write_text(out, encoding="utf-8")
    return "".join(printed)


def form(text: str) -> str:
    """Leave out numbers and digests, and how many spaces there are."""
    text = re.sub(r"\b[0-9a-f]{12,}\b|[-−]?\d[\d,.]*(e[-+]\d+)?", "#", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_the_command_is_installed() -> None:
    command = [Path(sys.executable).with_name("consolidate"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("consolidate, version ")


@pytest.mark.parametrize("page", [p for p in RUN if list(blocks(p))], ids=relative)
def test_examples_run(page: Path, workspace: Path, hub: loopback_hub.Hub) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for language, code in blocks(page):
        if language == "sh":
            printed = run_shell(code, workspace, hub)
        elif language == "text":
            assert form(code) in form(printed), f"the block before prints\n{printed}"
        elif language == "toml":
            if name := re.match(r"# (\w+\.toml)\n", code):
                (workspace / name[1]).write_text(code, encoding="utf-8")
        else:
            with warnings.catch_warnings():  # those of pytest stay: a warning is an error
                for message in OF_OTHERS:
                    warnings.filterwarnings("ignore", message, FutureWarning)
                exec(compile(code, page, "exec"), namespace)


@pytest.mark.slow
def test_the_loop_for_accelerate_in_two_processes(workspace: Path, hub: loopback_hub.Hub) -> None:
    text = (DOCS / "how-to" / "accelerate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# train\.py\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    measure, start, check = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code += (  # what each process ends with, to compare
        "end = accelerator.unwrap_model(trained).state_dict()\n"
        "torch.save(end, f'end-{accelerator.process_index}.pt')\n"
    )
    (workspace / "train.py").write_text(code, encoding="utf-8")
    run_shell(measure, workspace, hub)
    command, *words = shlex.split(start.splitlines()[-1], comments=True)
    assert command == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("penalty ") == 1
    run_shell(check, workspace, hub)
    ends = [torch.load(workspace / f"end-{i}.pt") for i in range(2)]
    written = load_file(workspace / "my-model-2" / "model.safetensors")
    before = load_file(workspace / "my-model" / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, ends[0][name])
        assert torch.equal(tensor, ends[1][name])
    assert not torch.equal(written["classifier.weight"], before["classifier.weight"])


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings(page)}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "`", prose(page))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    for link in ("".join(found) for found in links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert not path.startswith("/"), f"{relative(page)}: {link} is not relative"
        assert target.exists(), f"{relative(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{relative(page)} links to {link}"


@pytest.mark.parametrize("page", OURS, ids=relative)
def test_headings_are_unique(page: Path) -> None:
    assert sorted(headings(page)) == sorted(set(headings(page)))


def test_the_readme_is_short_and_narrow_as_are_the_pages_beside_it() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for page in ROOT.glob("*.md"):
        for line in prose(page).splitlines():
            assert len(line) <= 100 or line.startswith("|"), f"{relative(page)}: {line}"


def test_the_page_of_the_command_line_is_current() -> None:
    assert write_docs.run(["--check"]) == 0
