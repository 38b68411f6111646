"""The card of a checkpoint that a command made: whose it is, what it tells, what it keeps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import consolidate
from consolidate.api import verify
from consolidate.views.output_card import _names
from formats.checkpoint import open_checkpoint
from support.checkpoints import Write
from support.loopback_hub import TOKEN, Hub, run

MODEL = {"model": "support.networks:make_network"}
TRAIN = MODEL | {"max_steps": 2, "overwrite": True}
THEIRS = "---\nlicense: mit\ntags: [theirs]\n---\n# The base\n\nTheir own words.\n"


@pytest.fixture
def base(network_checkpoint: Path, write_task: Write) -> Path:
    """A checkpoint with the card of whoever made it, and two tasks beside it."""
    write_task("a")
    write_task("b", seed=1)
    (network_checkpoint / "README.md").write_text(THEIRS)
    return network_checkpoint


def finetuned(source: Path, data_name: str, target: str, **options: Any) -> Path:
    data = source.parent / f"{data_name}.npz"
    out = source.parent / target
    held = {"penalty": "none"} if not (source / "fisher").exists() else {"ewc_lambda": 1.0}
    consolidate.finetune(source, data, output_dir=out, **TRAIN | held | options)
    return out


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata_text(folder: Path) -> str:
    return card(folder).split("---\n")[1]


def metadata(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(metadata_text(folder)))


def named(folder: Path, name: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
    return folder


def test_a_fine_tuned_model_has_a_card_of_its_own(base: Path) -> None:
    out = finetuned(base, "a", "out", evaluate={"a": base.parent / "a.npz"})
    text = card(out)
    assert "Their own words" not in text
    assert "| 1 | a |" in text
    assert str(base.parent) not in text
    data = metadata(out)
    assert (data["license"], data["tags"]) == ("mit", ["consolidate", "ewc"])
    assert data["library_name"] == "pytorch"
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert data["model-index"][0]["results"][0]["source"] == {"name": "consolidate ledger"}
    assert (out / "LICENSE").read_text() == "free\n"
    assert verify(out)["other_files"] == ["LICENSE", "README.md", "config.json"]
    again = finetuned(base, "a", "again", evaluate={"a": base.parent / "a.npz"})
    assert card(again) == text


@pytest.fixture
def above(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint in the working directory `above`, beside a folder `here`."""
    (tmp_path / "above" / "here").mkdir(parents=True)
    for file in (base, tmp_path / "a.npz"):
        shutil.move(file, tmp_path / "above")
    monkeypatch.chdir(tmp_path / "above")
    return tmp_path / "above" / base.name


@pytest.mark.parametrize(("name", "known"), [("them/base", True), ("here/base", False)])
def test_the_base_is_a_repository_or_nothing(above: Path, name: str, known: bool) -> None:
    out = finetuned(named(above, name), "a", "out")
    assert metadata(out).get("base_model") == ("them/base" if known else None)
    assert ("made from them/base" in card(out)) == known
    assert (name in metadata_text(out)) == known


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "/home/me/base",
        "./base",
        "above/base",  # a folder above the checkpoint
        "runs/checkpoint-500",
        "a/b/c",
        None,
        [1],
    ],
)
def test_what_cannot_be_a_repository_is_not_named(above: Path, name: Any) -> None:
    assert _names(open_checkpoint(named(above, name))) == []


def test_the_base_is_known_down_the_chain(base: Path) -> None:
    first = finetuned(named(base, "them/base"), "a", "first")
    config = json.loads((first / "config.json").read_text())
    del config["_name_or_path"]
    (first / "config.json").write_text(json.dumps(config))
    (first / "README.md").write_text(card(first) + "\nOf the first one.\n")
    second = finetuned(first, "b", "second")
    assert metadata(second)["base_model"] == "them/base"
    assert metadata(second)["base_model_relation"] == "finetune"
    assert metadata(second)["license"] == "mit"
    assert "Of the first one." not in card(second)
    assert "| 2 | b |" in card(second)


def test_where_the_output_replaces_its_source_a_persons_text_stays(base: Path) -> None:
    finetuned(base, "a", base.name)
    assert "Their own words." in card(base)
    assert metadata(base)["tags"] == ["theirs", "consolidate", "ewc"]
    finetuned(base, "b", base.name)
    assert card(base).count("consolidate:begin") == 1
    assert "| 2 | b |" in card(base)
    for number, content in enumerate((b"---\nbroken: [\n---\nMine.\n", b"\xff Mine.\n")):
        (base / "README.md").write_bytes(content)
        finetuned(base, "b", base.name, task=f"t{number}")
        assert (base / "README.md").read_bytes() == content


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"\xff\xfe", b"x" * (2**20 + 1)])
def test_a_card_of_the_base_that_cannot_be_read_is_passed_over(base: Path, content: bytes) -> None:
    (base / "README.md").write_bytes(content)
    assert "license" not in metadata(finetuned(base, "a", "out"))


def test_whoever_writes_into_a_card_has_changed_no_result(base: Path) -> None:
    out = finetuned(base, "a", "out")
    (out / "README.md").write_text(card(out) + "\nMine.\n")
    (base / "README.md").write_text("Another one.\n")
    data, options = base.parent / "a.npz", TRAIN | {"penalty": "none"}
    again = consolidate.finetune(base, data, output_dir=out, **options)
    assert again["status"] == "cached"
    assert card(out).endswith("\nMine.\n")


def test_a_merge_names_what_it_was_made_from(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    one = finetuned(named(base, "them/one"), "a", "1")
    two = finetuned(named(other, "them/two"), "b", "2")
    consolidate.merge([one, two], output_dir=tmp_path / "out")
    data = metadata(tmp_path / "out")
    assert data["base_model"] == ["them/one", "them/two"]
    assert data["base_model_relation"] == "merge"
    assert "license" not in data  # they do not say the same


def test_the_same_weights_keep_their_card(base: Path, tmp_path: Path) -> None:
    consolidate.fisher(base, tmp_path / "a.npz", output_dir=tmp_path / "out", **MODEL)
    assert card(tmp_path / "out") == THEIRS
    tuned = finetuned(named(base, "them/base"), "a", "tuned")
    (tuned / "README.md").write_text(card(tuned) + "# Mine\n")
    consolidate.fisher(tuned, tmp_path / "b.npz", output_dir=tmp_path / "added", add=True, **MODEL)
    text = card(tmp_path / "added")
    assert "# Mine\n" in text
    assert "| 2 | b |" in text
    assert "made from them/base" in text


def test_a_push_renews_what_is_ours(base: Path, hub: Hub, tmp_path: Path) -> None:
    hub.put("them/base", base)
    out = finetuned(named(base, "them/base"), "a", "out")
    with_hub = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    push = ("push", out, "user/model")
    code, _, err = run(tmp_path, *push, **with_hub)
    assert code == 0, err
    sent = hub.repositories["user/model"].files["README.md"].decode()
    assert "\n# user/model\n\n<!-- consolidate:begin user/model (each push" in sent
    assert f"made from [them/base]({hub.address}/them/base)" in sent
    assert "consolidate finetune user/model --model" in sent
    assert "path/to/this/folder" not in sent
    (out / "README.md").write_text("# Mine\n\nMy words.\n\n" + card(out).split("---\n", 2)[2])
    hub.repositories.pop("user/model")
    assert run(tmp_path, *push, **with_hub)[0] == 0
    sent = hub.repositories["user/model"].files["README.md"].decode()
    assert "My words." in sent
    assert "consolidate:begin user/model (each push" in sent


def test_a_base_from_the_hub_is_named(base: Path, hub: Hub, tmp_path: Path) -> None:
    hub.put("them/base", base)
    words = ("--model", MODEL["model"], "--penalty", "none", "--max-steps", "2")
    code, _, err = run(
        tmp_path, "finetune", "them/base", "--data", tmp_path / "a.npz", *words,
        "--output-dir", tmp_path / "out", HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert code == 0, err
    data = metadata(tmp_path / "out")
    assert (data["base_model"], data["base_model_relation"]) == ("them/base", "finetune")
    assert data["license"] == "mit"
    assert "Their own words" not in card(tmp_path / "out")
