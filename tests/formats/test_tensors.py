import json
import resource
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from formats.checkpoint_files import read_index
from formats.digest import DTYPES, set_digest, tensor_record
from formats.errors import InputError
from formats.tensors import TensorFiles, dtype_of, open_tensors, shape_of, write_tensors

PT = {"format": "pt"}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator),
        "layer.weight": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "layer.bias": torch.randn(4, generator=generator),
        "steps": torch.tensor(12),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.ones(0, 3),
    }


def digest(tensors) -> str:
    return set_digest({name: tensor_record(tensors[name]) for name in tensors})


def raw(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tmp_path, some_tensors(), metadata=PT, max_shard_size=40)
    return tmp_path


def change_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("size", [10**9, 100, 40, 1])
def test_round_trip(tmp_path, size):
    tensors = some_tensors()
    files = write_tensors(tmp_path, tensors, metadata=PT, max_shard_size=size)
    assert sorted(files) == sorted(tmp_path.iterdir())
    found = open_tensors(tmp_path)
    assert dict(found).keys() == tensors.keys()
    assert len(found) == len(tensors)
    assert "mask" in found
    assert "nothing" not in found
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found.dtype(name) == dtype_of(tensors, name) == dtype_of(found, name) == tensor.dtype
        assert found.shape(name) == shape_of(tensors, name) == shape_of(found, name) == tensor.shape
    assert digest(found) == digest(tensors)
    assert found.metadata == PT
    assert found.path == tmp_path
    assert found.files == [file for file in files if file.suffix == ".safetensors"]


def test_names_of_shards_are_the_hubs(sharded):
    names = sorted(path.name for path in sharded.iterdir())
    assert names[0] == "model-00001-of-00003.safetensors"
    assert names[-1] == "model.safetensors.index.json"
    index = json.loads((sharded / names[-1]).read_text())
    assert index["metadata"] == {"total_size": 112 + 32 + 16 + 8 + 3}
    assert list(index["weight_map"]) == sorted(some_tensors())
    assert index["weight_map"]["embed.weight"] == "model-00001-of-00003.safetensors"


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_goes_round(tmp_path, name):
    tensor = (torch.arange(6 * DTYPES[name].itemsize, dtype=torch.uint8) % 2).view(DTYPES[name])
    write_tensors(tmp_path, {"x": tensor.reshape(2, 3)}, metadata=PT)
    found = open_tensors(tmp_path)
    assert found.dtype("x") == tensor.dtype
    assert tensor_record(found["x"]) == tensor_record(tensor.reshape(2, 3))


def test_bytes_are_those_of_the_safetensors_library(tmp_path):
    tensors = {name: torch.randn(3, 5) for name in ("a", 'quote"', "z.weight", "β")}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=PT)
    write_tensors(tmp_path, tensors, stem="ours", metadata=PT)
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs


def test_order_is_the_writers_and_all_is_aligned(tmp_path):
    tensors = {
        "z": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3),
        "d": torch.ones(1, dtype=torch.float64),
        "a": torch.ones(2),
        "h": torch.ones(3, dtype=torch.float16),
    }
    write_tensors(tmp_path, tensors, metadata=PT)
    found = open_tensors(tmp_path)
    assert list(found) == ["d", "b", "a", "h", "z"]
    for name in found:
        assert found[name].data_ptr() % found[name].element_size() == 0


def test_header_has_exactly_the_metadata(tmp_path):
    write_tensors(tmp_path, {"x": torch.ones(2)}, metadata=PT)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("x"), torch.ones(2))


def test_no_tensors_at_all(tmp_path):
    write_tensors(tmp_path, {}, stem="fisher", metadata={"consolidate": "{}"})
    found = open_tensors(tmp_path, "fisher")
    assert len(found) == 0
    assert found.metadata == {"consolidate": "{}"}


def test_cast_of_floating_tensors_only(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path, tensors, metadata=PT, dtype=torch.bfloat16, max_shard_size=40)
    found = open_tensors(tmp_path)
    assert found["embed.weight"].equal(tensors["embed.weight"].to(torch.bfloat16))
    assert found["steps"].dtype == torch.int64
    assert found["mask"].dtype == torch.bool


def test_views_and_parameters_are_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "t": base.T,
        "row": base[1],
        "p": torch.nn.Parameter(base),
        "e": base[0].expand(2, 4),
    }
    write_tensors(tmp_path, tensors, metadata=PT)
    found = open_tensors(tmp_path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_lazy_source_is_written_without_being_held(tmp_path, sharded):
    (tmp_path / "again").mkdir()
    write_tensors(tmp_path / "again", open_tensors(sharded), metadata=PT)
    assert digest(open_tensors(tmp_path / "again")) == digest(some_tensors())


def test_modes_follow_the_umask(sharded):
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600 for path in sharded.iterdir())
    (sharded / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in sharded.iterdir()}
    assert len(modes) == 1


def test_existing_file_is_not_written_over(tmp_path):
    write_tensors(tmp_path, {"x": torch.ones(2)}, metadata=PT)
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path, {"x": torch.zeros(2)}, metadata=PT)
    assert open_tensors(tmp_path)["x"].equal(torch.ones(2))


def test_dtype_that_cannot_be_stored(tmp_path):
    with pytest.raises(InputError, match="complex128"):
        write_tensors(tmp_path, {"x": torch.ones(2, dtype=torch.complex128)}, metadata=PT)
    assert not list(tmp_path.iterdir())


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    write_tensors(tmp_path, {"x": torch.ones(2)}, metadata=PT)
    before = (tmp_path / "model.safetensors").read_bytes()
    found = open_tensors(tmp_path)
    found["x"].add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert open_tensors(tmp_path)["x"].equal(torch.ones(2))


def test_bare_file(tmp_path):
    write_tensors(tmp_path, {"x": torch.ones(2)}, stem="some", metadata=PT)
    assert open_tensors(tmp_path / "some.safetensors")["x"].equal(torch.ones(2))


def test_large_files_are_not_read(tmp_path):
    size = 10 << 30
    header = {"big": entry("F32", [size // 4], 0, size), "small": entry("F32", [2], size, size + 8)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(header, b""))
    end = path.stat().st_size + size + 8
    with open(path, "r+b") as file:
        file.truncate(end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = open_tensors(tmp_path)
    assert found.shape("big") == (size // 4,)
    assert found["small"].equal(torch.zeros(2))
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100e6


def test_file_cut_short_anywhere(tmp_path):
    write_tensors(tmp_path, some_tensors(), metadata=PT)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.safetensors is (truncated|empty)"):
            open_tensors(tmp_path)
    path.write_bytes(whole)
    assert digest(open_tensors(tmp_path)) == digest(some_tensors())


@pytest.mark.parametrize(
    "content",
    [
        raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, bytes(8)),
        raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20)),
        raw({"a": entry("F32", [2], 4, 12)}, bytes(12)),
        raw({"a": entry("F32", [3], 0, 8)}, bytes(8)),
        raw({"a": entry("F32", [2**62, 2**62], 0, 8)}, bytes(8)),
        raw({"a": entry("F32", [2], 8, 0)}, bytes(8)),
        raw({"a": entry("F32", [2], -8, 0)}, bytes(8)),
        raw({"a": entry("F32", [2], 0, 2**70)}, bytes(8)),
        raw({"a": entry("F32", [-2], 0, 8)}, bytes(8)),
        raw({"a": entry("F32", [2], 0, 8)}, bytes(9)),
        raw({"a": entry("Q4", [2], 0, 8)}, bytes(8)),
        raw({"a": {"dtype": "F32"}}, bytes(8)),
        raw({"__metadata__": {"format": 1}, "a": entry("F32", [2], 0, 8)}, bytes(8)),
        raw(b"[]", b""),
        raw(b"{", b""),
        raw(b'{"a\xff": 1}', b""),
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        b"<html>Not found</html>",
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_header_that_lies(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or not a safetensors"):
        open_tensors(tmp_path)


def test_dtype_that_torch_cannot_hold(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry("F4", [2], 0, 1)}, bytes(1)))
    with pytest.raises(InputError, match=r"tensor 'a' has an unsupported dtype: .*, found F4"):
        open_tensors(tmp_path)


def test_git_lfs_pointer(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(InputError, match="git lfs pull"):
        open_tensors(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"expected fisher\.safetensors or .*, found neither"):
        open_tensors(tmp_path, "fisher")
    with pytest.raises(InputError, match=r"x\.safetensors does not exist"):
        open_tensors(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors is not a file"):
        open_tensors(tmp_path)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors does not exist"):
        open_tensors(sharded)


def test_tensor_of_the_index_that_is_nowhere(sharded):
    change_index(sharded, lambda m: m.update(ghost="model-00002-of-00003.safetensors"))
    with pytest.raises(InputError, match=r"'ghost' is missing: expected in model-00002-of-00003"):
        open_tensors(sharded)


def test_tensor_in_another_shard(sharded):
    change_index(sharded, lambda m: m.update(steps="model-00001-of-00003.safetensors"))
    with pytest.raises(
        InputError, match=r"'steps' is misplaced: .* model-00001.*found in model-0000"
    ):
        open_tensors(sharded)


def test_tensor_that_the_index_lacks(sharded):
    change_index(sharded, lambda m: m.pop("mask"))
    with pytest.raises(InputError, match=r"'mask' of model-0000.* is not listed in the index"):
        open_tensors(sharded)


def test_tensor_in_two_shards(sharded):
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    shutil.copy(first, second)
    with pytest.raises(InputError, match=r"'embed\.weight' is also in model-00001"):
        open_tensors(sharded)


def test_file_and_index_that_disagree(sharded):
    write_tensors(sharded, {"x": torch.ones(2)}, metadata=PT)
    with pytest.raises(InputError, match="contains both"):
        open_tensors(sharded)


def test_index_of_a_single_file(tmp_path):
    write_tensors(tmp_path, {"x": torch.ones(2)}, metadata=PT)
    index = {"metadata": {}, "weight_map": {"x": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(open_tensors(tmp_path)) == ["x"]


@pytest.mark.parametrize("absolute", [False, True])
def test_index_that_leads_out_of_the_folder(tmp_path, absolute):
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    outside = write_tensors(tmp_path, {"x": torch.ones(2)}, stem="secret", metadata=PT)[0]
    names = (
        [str(outside)] if absolute else ["../secret.safetensors", "sub/../../secret.safetensors"]
    )
    for name in [*names, "..", ".", "", "sub/x"]:
        index = {"weight_map": {"x": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="expected the name of a file in this folder"):
            open_tensors(folder)


def test_link_out_of_the_folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    outside = write_tensors(tmp_path, {"x": torch.ones(2)}, stem="secret", metadata=PT)[0]
    (folder / "model-1.safetensors").symlink_to(outside)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"is a link to .*outside the checkpoint"):
        open_tensors(folder)
    index.unlink()
    (folder / "model-1.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"is a link to .*outside the checkpoint"):
        open_tensors(folder)


def test_links_of_the_hub_cache_and_within_the_folder(tmp_path):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--mine" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_tensors(blobs, {"x": torch.ones(2)}, metadata=PT)[0].rename(blobs / "abcdef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcdef")
    assert list(open_tensors(snapshot)) == ["x"]
    (snapshot / "fisher").mkdir()
    (snapshot / "fisher" / "fisher.safetensors").symlink_to("../../../blobs/abcdef")
    assert list(open_tensors(snapshot / "fisher", "fisher")) == ["x"]
    (tmp_path / "link").symlink_to(snapshot)
    assert list(open_tensors(tmp_path / "link")) == ["x"]
    (snapshot / "other.safetensors").symlink_to("model.safetensors")
    assert list(open_tensors(snapshot, "other")) == ["x"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('"\ud800"', "is not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "expected a 'weight_map'"),
        ('{"weight_map": {}}', "expected a 'weight_map'"),
        ('{"weight_map": []}', "expected a 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "expected a file name for tensor 'a', found 1"),
    ],
)
def test_index_that_is_none(tmp_path, text, why):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=why):
        read_index(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_index(tmp_path / "missing.json")


def test_metadata_is_that_of_the_first_file(tmp_path):
    a = write_tensors(tmp_path, {"x": torch.ones(2)}, stem="a", metadata={"k": "1"})
    b = write_tensors(tmp_path, {"y": torch.ones(2)}, stem="b", metadata={"k": "2"})
    tensors = TensorFiles(tmp_path, [*b, *a])
    assert tensors.metadata == {"k": "2"}
    assert list(tensors) == ["y", "x"]
    assert tensors.file_of("x") == a[0]


def test_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, stderr=-3, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(InputError, match=r"4,000,000 bytes needed, 1,0\d\d,\d\d\d were"):
            write_tensors(tmp_path, {"x": torch.ones(1_000_000)}, metadata=PT)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_headers_of_all_shards_together_are_bounded(sharded, monkeypatch):
    files = sorted(sharded.glob("*.safetensors"))
    sizes = [int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    monkeypatch.setattr("formats.tensors.MAX_HEADER_BYTES", sum(sizes))
    assert len(open_tensors(sharded)) == len(some_tensors())
    monkeypatch.setattr("formats.tensors.MAX_HEADER_BYTES", sum(sizes) - 1)
    with pytest.raises(InputError, match=rf"at most {sizes[0] - 1:,} of .*, found {sizes[0]:,}"):
        open_tensors(sharded)


def test_a_header_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((84_000_000).to_bytes(8, "little") + b"{")
    with pytest.raises(
        InputError, match=r"header too large: expected at most 25,000,000 of .*, found 84,000,000"
    ):
        open_tensors(file)


def test_more_tensors_than_any_model_has_are_refused(tmp_path, monkeypatch):
    write_tensors(tmp_path, {f"x{i}": torch.ones(1) for i in range(9)}, metadata=PT)
    monkeypatch.setattr("formats.tensors.MAX_TENSORS", 9)
    assert len(open_tensors(tmp_path)) == 9
    monkeypatch.setattr("formats.tensors.MAX_TENSORS", 8)
    with pytest.raises(InputError, match="expected at most 8 tensors, found 9"):
        open_tensors(tmp_path)
