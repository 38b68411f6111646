"""README and docs/: their commands and their Python run, their links resolve, cli.md is current.

A page's blocks marked `sh` and `python` run in order, in one folder and one namespace; those marked
`toml` whose first line is `# NAME.toml` are written to that file on the way. The folder
holds what the examples speak of (see `workspace`), and nothing is reset between blocks: a command
may use what an earlier one wrote. `<!-- not run: REASON -->` in the line before leaves a block out.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import in_process, loopback_hub

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RUN = [page for page in PAGES if page.name != "cli.md" and page.parent.name != "results"]
BLOCK = re.compile(
    r"^(<!-- not run: .+ -->\n)?```(sh|python|toml)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
CALLED_BY_PEFT = "`is_gradient_checkpointing` is deprecated"  # by peft 0.21 in transformers 5.24
NOT_OURS = {"git", "pip", "cd", "npm", "python", "torchrun"}  # what a block may say beside us


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Languages and code; Python is moved down to the lines that it has on the page."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        skipped, language, code = block.groups()
        if not skipped:
            above = text.count("\n", 0, block.start(3)) if language == "python" else 0
            yield language, "\n" * above + code


def write_sentences(folder: Path) -> None:
    """Tasks with the same labels: opinions on food, then on films, then on trains."""
    things = {
        "old": ("soup", "bread", "cheese", "salad"),
        "new": ("film", "plot", "actor", "scene"),
        "third": ("train", "seat", "view", "ride"),
    }
    words = {"good": ("fine", "lovely", "superb"), "bad": ("awful", "dull", "poor")}
    for task, nouns in things.items():
        rows = [
            {"text": f"the {noun} was {word}", "label": label}
            for noun in nouns
            for label, adjectives in words.items()
            for word in adjectives
        ]
        for name, chosen in ((task, rows), (f"{task}-task", rows), (f"{task}-test", rows[::3])):
            lines = [json.dumps(row) + "\n" for row in chosen]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(chosen)


def write_topics(folder: Path) -> None:
    """A task with other labels."""
    topics = {"food": ("soup", "bread"), "film": ("plot", "actor"), "rail": ("train", "seat")}
    rows = [
        {"text": f"the {noun} was fine", "label": label}
        for label, nouns in topics.items()
        for noun in nouns
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "topics.jsonl").write_text(lines, encoding="utf-8")


def write_text_classifier(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder.mkdir()
    sentences = (
        "the was soup bread cheese salad film plot actor scene fine lovely superb awful dull"
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sentences.split(), "poor"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the examples.

    my-model (a text classifier), {old,new}{,-task,-test}.{jsonl,csv}; and the quickstart's: start
    (a network, by `--model network:mlp`) and {a,b}-{train,test}.npz.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from scripts import quickstart

    quickstart.write_data(tmp_path)
    quickstart.train_start(tmp_path, epochs=1)
    write_sentences(tmp_path)
    write_topics(tmp_path)
    write_text_classifier(tmp_path / "my-model")
    return tmp_path


def run_shell(block: str, folder: Path, hub: loopback_hub.Hub) -> None:
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
        code, _, err = in_process.consolidate(folder, *words[1:], variables=variables)
        assert code == 0, f"{line}\n{err}"


def test_the_command_is_installed() -> None:
    command = [Path(sys.executable).with_name("consolidate"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("consolidate, version ")


@pytest.mark.parametrize("page", [p for p in RUN if list(blocks(p))], ids=relative)
def test_examples_run(page: Path, workspace: Path, hub: loopback_hub.Hub) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, code in blocks(page):
        if language == "sh":
            run_shell(code, workspace, hub)
        elif language == "toml":
            if name := re.match(r"# (\w+\.toml)\n", code):
                (workspace / name[1]).write_text(code, encoding="utf-8")
        else:
            with warnings.catch_warnings():  # those of pytest stay: a warning is an error
                warnings.filterwarnings("ignore", CALLED_BY_PEFT, FutureWarning)
                exec(compile(code, page, "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{relative(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{relative(page)} links to {link}"


def test_the_page_of_the_command_line_is_current() -> None:
    command = [sys.executable, ROOT / "scripts" / "write_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
