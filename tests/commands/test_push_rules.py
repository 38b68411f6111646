"""What `push` sends of configuration and code: no local path, and no code that nothing names."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from consolidate.api import fisher
from consolidate.commands.push_rules import named_code, without_local_paths
from formats.errors import InputError
from support.loopback_hub import TOKEN, Hub, run

CODE = {
    "modeling_own.py": "from .layers.block import Block\nimport own_absolute\nprint('run')\n",
    "tokenization_own.py": "def load():\n from . import words, nothing\n from .lost import x\n",
    "tokenization_own_fast.py": "",
    "processing_own.py": "",
    "words.py": "pattern = '\\d'\n",
    "layers/__init__.py": "from .norm import Norm\n",
    "layers/norm.py": "",
    "layers/block.py": "from .. import shared\nfrom ... import outside\n",
    "layers/unused.py": "",
    "shared.py": "from . import modeling_own\n",
    "elsewhere.py": "",
    "own_absolute.py": "",
    "train_secrets.py": "TOKEN = 'secret'\n",
}
SENT = {
    *("modeling_own.py", "tokenization_own.py", "tokenization_own_fast.py", "processing_own.py"),
    *("words.py", "layers/__init__.py", "layers/norm.py", "layers/block.py", "shared.py"),
}
AUTO_MAPS: dict[str, Any] = {
    "config.json": {
        "auto_map": {"AutoModel": "modeling_own.Model", "AutoConfig": "user/repo--elsewhere.Config"}
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own_fast.Own"]}
    },
    "processor_config.json": {
        "image_processor": {"auto_map": {"AutoImageProcessor": "processing_own.Own"}}
    },
}


def write_code(folder: Path) -> None:
    for name, text in CODE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, content in AUTO_MAPS.items():
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **content}))


def emptied(folder: Path, content: dict[str, Any]) -> Any:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    sent = without_local_paths(path)
    assert json.loads(path.read_text()) == content
    return content if sent == path else json.loads(sent)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        *(
            "/home/alice/secret-project",
            "./out",
            "../out",
            "~/models/x",
            "out/run/3",
            "C:\\models\\x",
        ),
        *("user/model/", "runs/checkpoint-500", "here", "here/inner", "file:///srv/x", "a b"),
    ],
)
def test_a_local_path_is_emptied(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "inner").mkdir(parents=True)
    content = {
        "_name_or_path": value,
        "name_or_path": value,
        "text_config": {"_name_or_path": value, "hidden_size": 3},
        "parts": [{"base_model_name_or_path": value}],
    }
    with caplog.at_level(logging.INFO, "consolidate"):
        assert emptied(tmp_path, content) == {
            "_name_or_path": "",
            "name_or_path": "",
            "text_config": {"_name_or_path": "", "hidden_size": 3},
            "parts": [{"base_model_name_or_path": ""}],
        }
    assert "_name_or_path, name_or_path, base_model_name_or_path" in caplog.text


def test_the_name_of_a_repository_and_all_else_stay(tmp_path: Path) -> None:
    content = {
        "_name_or_path": "user/model",
        "name_or_path": "gpt2",
        "text_config": {"_name_or_path": "", "bos_token": "/think"},
        "vocab_file": "vocab.txt",
        "special_tokens_map_file": None,
        "modules": [{"path": "1_Pooling"}],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    assert without_local_paths(path) == path


def test_the_place_of_a_file_is_left_out(tmp_path: Path) -> None:
    content = {"special_tokens_map_file": "/home/alice/x", "tokenizer_file": "D:/x", "n": "é"}
    assert emptied(tmp_path, content) == {"n": "é"}


def test_lists_of_paths_lose_the_local_ones(tmp_path: Path) -> None:
    content = {
        "name_or_path": ["/home/alice/x", "user/model", ["~/x"]],
        "parts": [{"vocab_file": ["/a", "vocab.txt", "C:/b", "/c"]}],
        "bad_words": ["/think"],
    }
    assert emptied(tmp_path, content) == {
        "name_or_path": ["", "user/model", [""]],
        "parts": [{"vocab_file": ["vocab.txt"]}],
        "bad_words": ["/think"],
    }


def test_code_is_what_auto_maps_name_and_what_that_imports(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_code(tmp_path)
    with caplog.at_level(logging.INFO, "consolidate"):
        assert named_code(tmp_path) == SENT
    assert "code needed by an auto_map is missing in" in caplog.text
    assert "'lost.py'" in caplog.text
    assert "nothing" not in caplog.text
    (tmp_path / "words.py").write_text("def (")
    with pytest.raises(InputError, match=r"words\.py: an auto_map names this code"):
        named_code(tmp_path)


@pytest.mark.parametrize(
    "auto_map",
    [{}, None, "x", 3, {"A": "../secret.X"}, {"A": "/secret.X"}, {"A": [None, "no dot"]}],
)
def test_an_odd_auto_map_names_nothing(auto_map: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert named_code(folder) == set()


def test_code_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").symlink_to(tmp_path / "secret.py")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "own.Own"}}))
    with pytest.raises(InputError, match="outside the checkpoint"):
        named_code(folder)


def test_what_arrives(network_checkpoint: Path, write_task: Any, hub: Hub, tmp_path: Path) -> None:
    secret = "/home/alice/secret-project"
    config = json.loads((network_checkpoint / "config.json").read_text())
    (network_checkpoint / "config.json").write_text(
        json.dumps({**config, "_name_or_path": secret, "inner": {"_name_or_path": "user/base"}})
    )
    (network_checkpoint / "tokenizer_config.json").write_text(json.dumps({"name_or_path": secret}))
    write_code(network_checkpoint)
    fisher(network_checkpoint, write_task("old"), model="support.networks:make_network")
    before = {path: path.read_bytes() for path in network_checkpoint.rglob("*") if path.is_file()}

    def pushed(*options: str) -> tuple[str, str]:
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
        command = ("push", network_checkpoint, "user/model", *options)
        code, out, err = run(tmp_path, *command, **variables)
        assert code == 0, err
        return out, err

    out, err = pushed("--dry-run")
    assert f"Code needed by an auto_map: {', '.join(sorted(SENT))}\n" in out
    assert "'train_secrets.py'" in err
    assert set(json.loads(pushed("--json")[0])["code"]) == SENT
    files = hub.repositories["user/model"].files
    assert {name for name in files if name.endswith(".py")} == SENT
    assert not any(b"secret" in content for content in files.values())
    sent = json.loads(files["config.json"])
    assert sent["_name_or_path"] == ""
    assert sent["inner"]["_name_or_path"] == "user/base"
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads(pushed("--json")[0])["status"] == "unchanged"
