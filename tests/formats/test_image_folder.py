import hashlib
import io
import json
import os
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from PIL import Image

from formats.data import open_data
from formats.errors import InputError, UsageError
from formats.image_folder import IMAGE_SUFFIXES, decode_image


def picture(path, colour, size=(3, 2), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def folder(tmp_path):
    root = tmp_path / "pets"
    picture(root / "dog" / "1.png", (255, 0, 0))
    picture(root / "cat" / "b.PNG", (0, 255, 0))
    picture(root / "cat" / "a" / "deep.png", (0, 0, 255))
    picture(root / "Ant" / "x.bmp", 7, mode="L")
    (root / "cat" / ".DS_Store").write_text("")
    (root / "cat" / "notes.txt").write_text("")
    (root / "README.md").write_text("about")
    (root / "nothing").mkdir()
    return root


def test_rows_are_ordered_by_class_then_path(tmp_path):
    root = folder(tmp_path)
    rows = open_data(root)
    assert rows.name == "pets"
    assert rows.columns == ["image", "label"]
    assert [row["label"] for row in rows] == ["Ant", "cat", "cat", "dog"]
    assert rows.label_names("label") == ["Ant", "cat", "dog"]
    assert rows.label_names("image") is None
    assert rows[0]["image"].mode == "L"
    assert rows[0]["image"].size == (3, 2)
    assert [row["image"].getpixel((0, 0)) for row in rows[1:]] == [
        (0, 0, 255),
        (0, 255, 0),
        (255, 0, 0),
    ]
    assert rows.where(1, "image") == "pets/cat/a/deep.png, row 2, column 'image'"


def test_digest_is_of_paths_and_contents(tmp_path):
    root = folder(tmp_path)
    lines = b""
    for name in ("Ant/x.bmp", "cat/a/deep.png", "cat/b.PNG", "dog/1.png"):
        lines += json.dumps([name, hashlib.sha256((root / name).read_bytes()).hexdigest()]).encode()
        lines += b"\n"
    assert open_data(root).digest() == hashlib.sha256(lines).hexdigest()


def test_an_image_that_changes_after_it_was_read_is_refused(tmp_path):
    root = folder(tmp_path)
    for read in (lambda rows: rows.digest(), lambda rows: rows[0]):
        rows = open_data(root)
        read(rows)
        path = rows._files[0][1]
        content = path.read_bytes()
        path.write_bytes(content + b"\0")
        with pytest.raises(InputError, match=rf"{path} was changed while it was being read"):
            rows[0]
        path.write_bytes(content)


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    picture(tmp_path / "p" / "c" / "turned.jpg", 0, exif=exif)
    assert open_data(tmp_path / "p")[0]["image"].size == (2, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_a_damaged_image_is_named(tmp_path, content):
    root = folder(tmp_path)
    path = root / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:40] if content == "half" else content)
    rows = open_data(root)
    with pytest.raises(InputError, match=f"{path}, row 4: the image cannot be read"):
        rows[3]


def test_splits(tmp_path):
    root = tmp_path / "pets"
    picture(root / "train" / "cat" / "1.png", 0)
    picture(root / "train" / "dog" / "1.png", 0)
    picture(root / "test" / "dog" / "2.png", 0)
    with pytest.raises(InputError, match=r"several splits.*test, train"):
        open_data(root)
    assert [row["label"] for row in open_data(root, split="train")] == ["cat", "dog"]
    assert [row["label"] for row in open_data(root, split="test")] == ["dog"]
    with pytest.raises(InputError, match="no split 'dev'"):
        open_data(root, split="dev")


def test_images_without_class_folders_are_refused(tmp_path):
    picture(tmp_path / "p" / "1.png", 0)
    with pytest.raises(InputError, match="no class folders"):
        open_data(tmp_path / "p")


def test_a_missing_pillow_is_named(tmp_path, monkeypatch):
    root = folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"consolidate-ewc\[transformers\]"):
        open_data(root)


def test_labels_come_without_reading_an_image(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.png").write_bytes(b"no image")
    rows = open_data(tmp_path)
    assert list(rows.values("label")) == ["a", "b"]
    with pytest.raises(InputError, match=r"broken\.png"):
        next(rows.values("image"))


def test_every_documented_format_is_read(tmp_path: Path) -> None:
    for suffix in sorted(IMAGE_SUFFIXES):
        picture(tmp_path / "p" / "c" / f"x{suffix}", (255, 0, 0))
    rows = open_data(tmp_path / "p")
    assert len(rows) == len(IMAGE_SUFFIXES)
    for row in rows:
        assert row["image"].size == (3, 2)
    picture(tmp_path / "two" / "c" / "x.jpg", 0, format="MPO", save_all=True)  # as telephones do
    assert open_data(tmp_path / "two")[0]["image"].size == (3, 2)


def image_folder(root: Path, content: bytes) -> Path:
    (root / "data" / "c").mkdir(parents=True)
    (root / "data" / "c" / "x.png").write_bytes(content)
    return root / "data"


def parquet_file(root: Path, content: bytes) -> Path:
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}, features)
    data.to_parquet(root / "x.parquet")
    return root / "x.parquet"


def saved_dataset(root: Path, content: bytes) -> Path:
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}, features)
    data.save_to_disk(root / "saved")
    return root / "saved"


def saved_paths(root: Path, content: bytes) -> Path:
    (root / "x.png").write_bytes(content)
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [str(root / "x.png")]}, features)
    data.save_to_disk(root / "saved")
    return root / "saved"


def saved_lists(root: Path, content: bytes) -> Path:
    features = datasets.Features({"image": datasets.List({"one": datasets.Image()})})
    value = [{"one": {"bytes": content, "path": None}}]
    datasets.Dataset.from_dict({"image": [value]}, features).save_to_disk(root / "saved")
    return root / "saved"


@pytest.mark.parametrize(
    "write", [image_folder, parquet_file, saved_dataset, saved_paths, saved_lists]
)
@pytest.mark.parametrize("kind", ["EPS", "AVIF"])
def test_no_format_but_those_documented_is_decoded(kind, write, tmp_path, monkeypatch):
    mark = tmp_path / "gs-was-run"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {mark}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    content = io.BytesIO()
    Image.new("RGB", (3, 2)).save(content, kind)
    path = write(tmp_path, content.getvalue())
    rows = open_data(path)
    rows.digest()
    with pytest.raises(InputError, match=r"row 1|x\.png") as refused:
        rows[0]
    assert "expected one of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP" in str(refused.value)
    assert not mark.exists()


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    os.mkfifo(tmp_path / "pets" / "cat" / "x.png")
    rows = open_data(tmp_path / "pets")
    for read in (lambda: rows[0], rows.digest):
        with pytest.raises(InputError, match=r"x\.png: expected a regular file, found a pipe"):
            read()


def test_a_damaged_length_allocates_no_more_than_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") - 4
    data[at : at + 4] = (2**31 - 1).to_bytes(4, "big")
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with suppress(InputError):
            decode_image(path, "a.png")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
