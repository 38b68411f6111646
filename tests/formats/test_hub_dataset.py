import io
import json
import os
import struct
import subprocess
import sys
import time

import datasets
import pytest
from PIL import Image

from formats.data import open_data
from formats.errors import InputError, UsageError
from formats.hub_dataset import HubRows, is_hub_id, open_hub
from support import loopback_hub
from support.loopback_hub import COMMIT

FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def dataset(start, stop):
    values = {"text": [f"text {i}" for i in range(start, stop)], "label": [0, 1] * 5}
    values["label"] = values["label"][: stop - start]
    return datasets.Dataset.from_dict(values, features=FEATURES)


def repository(folder):
    """A data set repository as people upload it."""
    (folder / "data").mkdir(parents=True)
    dataset(0, 10).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    dataset(10, 13).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


SCRIPT = """
import json, sys
from formats.data import open_data
from formats.errors import ConsolidateError
for spec, options in json.loads(sys.argv[1]):
    try:
        rows = open_data(spec, **options)
        names = rows.label_names("label")
        said = [len(rows), rows.name, rows.columns, rows[0], names, rows.digest()]
    except ConsolidateError as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps(said))
"""


def start(tmp_path, cases, **variables):
    # the libraries read their variables once, at import: hence processes
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory):
    """A call where nothing answers: its retries take half a minute, which other tests use."""
    folder = tmp_path_factory.mktemp("unreachable")
    with start(folder, [["user/name", {}]], HF_ENDPOINT="http://127.0.0.1:9") as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("user/name", True),
        ("squad", True),
        ("user-1/na_me.v2", True),
        ("a/b/c", False),
        ("./name", False),
        ("/user/name", False),
        ("user/", False),
        ("user/..", False),
        ("", False),
        ("naïve", False),
        ("a b", False),
    ],
)
def test_ids(spec, expected):
    assert is_hub_id(spec) is expected


def test_the_hub_and_its_cache(tmp_path):
    with loopback_hub.serving("datasets", repository(tmp_path / "repository")) as address:
        train, first, several, missing, main, revision, lost, close = said(
            start(
                tmp_path,
                [
                    ["user/name", {"split": "train"}],
                    ["user/name", {"split": "train[:3]"}],
                    ["user/name", {}],
                    ["user/name", {"split": "dev"}],
                    ["user/name", {"split": "test", "revision": "main"}],
                    ["user/name", {"split": "test", "revision": "v9"}],
                    ["user/other", {}],
                    ["repositori", {}],
                ],
                HF_ENDPOINT=address,
            )
        )
    row = {"text": "text 0", "label": 0}
    names = ["no", "yes"]
    assert train[:5] == [10, "user/name", ["text", "label"], row, names]
    assert first[:4] == [3, "user/name", ["text", "label"], row]
    assert main[0] == 3
    assert several == [
        "InputError",
        "user/name: it has several splits; set split to one of: train, test",
    ]
    assert missing == [
        "InputError",
        "user/name: there is no split 'dev'; set split to one of: train, test",
    ]
    assert revision == ["InputError", "user/name: the Hub has no revision 'v9' of this repository"]
    assert lost[0] == "InputError"
    assert "user/other is neither a local file nor a readable dataset" in lost[1]
    assert close[0] == "InputError"
    assert close[1].endswith("; did you mean repository?")

    # what is in the cache needs no network; what is not there fails at once
    started = time.monotonic()
    cached, pinned, other, tag, absent = said(
        start(
            tmp_path,
            [
                ["user/name", {"split": "train"}],
                ["user/name", {"split": "train", "revision": COMMIT}],
                ["user/name", {"split": "train", "revision": "b" * 40}],
                ["user/name", {"split": "train", "revision": "main"}],
                ["user/other", {}],
            ],
            HF_HUB_OFFLINE="1",
        )
    )
    assert time.monotonic() - started < 60
    assert cached == train
    assert pinned == train
    assert f"revision {'b' * 40} is not in the cache" in other[1]
    assert "revision 'main' cannot be looked up" in tag[1]
    assert other[0] == tag[0] == absent[0] == "InputError"  # no retry cures it
    assert "HF_HUB_OFFLINE disables the Hub" in absent[1]


def test_a_local_repository_through_load_dataset(tmp_path):
    folder = repository(tmp_path / "repository")
    rows = open_hub(str(folder), split="test")
    assert [row["text"] for row in rows] == ["text 10", "text 11", "text 12"]
    with pytest.raises(InputError, match="set split to one of: train, test"):
        open_hub(str(folder))
    with pytest.raises(InputError, match=r"no split 'dev'; set split to one of: train, test"):
        open_hub(str(folder), split="dev")


def test_saved_datasets(tmp_path):
    whole = datasets.DatasetDict({"train": dataset(0, 10), "test": dataset(10, 13)})
    whole.save_to_disk(tmp_path / "whole")
    whole["train"].save_to_disk(tmp_path / "one")
    rows = open_data(tmp_path / "whole", split="test")
    assert rows.name == "whole"
    assert rows.columns == ["text", "label"]
    assert rows[2] == {"text": "text 12", "label": 0}
    assert rows.where(2, "text") == "whole, row 3, column 'text'"
    assert rows.label_names("label") == ["no", "yes"]
    assert rows.label_names("text") is None
    assert rows.beside_digest() == {"classes": {"label": ["no", "yes"]}}
    assert len(open_data(tmp_path / "one")) == 10
    with pytest.raises(InputError, match="set split to one of: train, test"):
        open_data(tmp_path / "whole")
    with pytest.raises(InputError, match="no split 'dev'"):
        open_data(tmp_path / "whole", split="dev")
    with pytest.raises(UsageError, match="without splits"):
        open_data(tmp_path / "one", split="train")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    whole_bytes, offsets = arrow.read_bytes(), struct.pack("<3i", 6, 12, 18)
    assert whole_bytes.count(offsets) == 1
    arrow.write_bytes(whole_bytes.replace(offsets, struct.pack("<3i", 6, 2**30, 18)))
    with pytest.raises(InputError, match="cannot be opened as a dataset"):
        open_data(tmp_path / "one")
    arrow.write_bytes(whole_bytes)
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="cannot be opened as a dataset"):
        open_data(tmp_path / "one")


def test_the_digest_depends_on_content_only(tmp_path):
    picture = Image.new("RGB", (2, 2), (9, 8, 7))
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    digests = set()
    for path, shards in (("here/a.png", 1), ("there/b.png", 2)):
        picture.save(tmp_path / path)
        features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
        values = {"image": [str(tmp_path / path)] * 4, "n": [1, 2, 3, 4]}
        data = datasets.Dataset.from_dict(values, features=features)
        target = tmp_path / path.replace("/", "-")
        data.save_to_disk(target, num_shards=shards)
        rows = open_data(target)
        assert rows[3]["image"].getpixel((0, 0)) == (9, 8, 7)
        digests.add(rows.digest())
    assert len(digests) == 1
    changed = datasets.Dataset.from_dict({**values, "n": [1, 2, 3, 5]}, features=features)
    changed.save_to_disk(tmp_path / "changed")
    assert open_data(tmp_path / "changed").digest() not in digests


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved, row 1, column 'image'"):
        open_data(tmp_path / "saved")[0]


def test_images_and_json_are_decoded_in_lists_too(tmp_path):
    stored = io.BytesIO()
    Image.new("RGB", (2, 2), (9, 9, 9)).save(stored, "PNG")
    picture = {"bytes": stored.getvalue(), "path": None}
    features = datasets.Features(
        {
            "grey": datasets.Image(mode="L"),
            "views": datasets.List(datasets.Image()),
            "talk": datasets.List(datasets.Json()),
            "none": datasets.Image(),
        }
    )
    talk = [{"role": "user", "tools": [1, "two"]}, {"role": "assistant"}]
    values = {"grey": [picture], "views": [[picture, picture]], "talk": [talk], "none": [None]}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "saved")
    row = open_data(tmp_path / "saved")[0]
    assert row["grey"].mode == "L"
    assert row["grey"].getpixel((0, 0)) == 9
    assert [view.getpixel((1, 1)) for view in row["views"]] == [(9, 9, 9)] * 2
    assert row["talk"] == talk
    assert row["none"] is None


def test_empty_datasets_are_refused():
    with pytest.raises(InputError, match="user/name is empty"):
        HubRows(dataset(0, 0), "user/name")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    dataset(0, 2).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in (tmp_path / "saved", "user/name"):
        with pytest.raises(UsageError, match=r"consolidate-ewc\[datasets\]") as caught:
            open_data(spec)
    assert str(caught.value).startswith("user/name is no file or folder; as a dataset of the Hub:")


def test_a_hub_that_does_not_answer_is_a_network_error(unreachable):
    ((kind, message),) = said(unreachable)
    assert kind == "NetworkError"
    assert message.startswith("user/name is not a local file, and the Hub cannot be reached (")
