import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from formats.atomic import replace_folder
from formats.checkpoint import check_finite, open_checkpoint, weight_records, write_checkpoint
from formats.digest import tensor_record
from formats.errors import InputError, NonFiniteError
from formats.tensors import TensorFiles, write_tensors

PT = {"format": "pt"}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 2, generator=generator),
        "a.bias": torch.randn(3, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
    }


def folder_with(folder, names, content="x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def same(found, expected) -> bool:
    return dict(weight_records(found)) == dict(weight_records(expected))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as transformers writes it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_tensors(folder, weights(), metadata=PT)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder_with(folder, ["tokenizer.json", "LICENSE", "1_Pooling/config.json"])


def test_folder(checkpoint):
    found = open_checkpoint(checkpoint)
    assert found.path == checkpoint
    assert found.config == {"model_type": "bert"}
    assert isinstance(found.weights, TensorFiles)
    assert same(found.weights, weights())
    assert found.files == (checkpoint / "model.safetensors",)


def test_shards(tmp_path):
    files = write_tensors(tmp_path, weights(), metadata=PT, max_shard_size=16)
    found = open_checkpoint(tmp_path)
    assert same(found.weights, weights())
    assert found.config == {}
    assert list(found.files) == files
    assert len(files) == 4


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "net.pth"])
def test_folder_with_a_pickle(tmp_path, name):
    torch.save({"state_dict": weights()}, tmp_path / name)
    found = open_checkpoint(tmp_path)
    assert same(found.weights, weights())
    assert found.files == (tmp_path / name,)


def test_folder_with_a_sharded_pickle(tmp_path):
    weight_map = {}
    for i, (name, tensor) in enumerate(weights().items()):
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{i}.bin")
        weight_map[name] = f"pytorch_model-{i}.bin"
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = open_checkpoint(tmp_path)
    assert same(found.weights, weights())


def test_safetensors_come_before_pickles(checkpoint):
    torch.save({"other": torch.ones(1)}, checkpoint / "pytorch_model.bin")
    assert same(open_checkpoint(checkpoint).weights, weights())


def test_the_only_safetensors_file(tmp_path):
    write_tensors(tmp_path, weights(), stem="network", metadata={})
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    found = open_checkpoint(tmp_path)
    assert same(found.weights, weights())
    assert found.files == (tmp_path / "network.safetensors",)


def test_shards_of_another_name(tmp_path):
    write_tensors(tmp_path, weights(), stem="network", metadata={}, max_shard_size=16)
    assert same(open_checkpoint(tmp_path).weights, weights())


def test_trainer_leftovers_are_not_weights(tmp_path):
    write_tensors(tmp_path, {"x": torch.ones(1)}, stem="adapter_model", metadata=PT)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    assert same(open_checkpoint(tmp_path).weights, weights())
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "mine.pt")
    assert same(open_checkpoint(tmp_path).weights, weights())


def test_weights_that_transformers_would_change_are_refused(tmp_path):
    write_tensors(tmp_path, weights(), metadata=PT)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match="transformers_weights is 'other"):
        open_checkpoint(tmp_path)
    config.unlink()
    write_tensors(tmp_path, {"x": torch.ones(1)}, stem="adapter_model", metadata=PT)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has model\.safetensors and an adapter, adapter_model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "net.pt", "net.pth", "net.bin", "net.ckpt"])
def test_bare_file(tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(weights(), path)
    else:
        torch.save(weights(), path)
    found = open_checkpoint(path)
    assert found.path == path
    assert found.config == {}
    assert same(found.weights, weights())


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"contains no model: expected .*, found nothing"):
        open_checkpoint(tmp_path)
    folder_with(tmp_path, ["notes.txt", "sub/model.safetensors"])
    with pytest.raises(InputError, match=r"contains no model: .*, found notes\.txt, sub"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"notes\.txt is not a checkpoint: expected a folder or"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        open_checkpoint(tmp_path)


def test_several_models(tmp_path):
    write_tensors(tmp_path, weights(), stem="one", metadata={})
    write_tensors(tmp_path, weights(), stem="two", metadata={})
    with pytest.raises(
        InputError, match=r"one model, found 2 \(one\.safetensors, two\.safetensors\)"
    ):
        open_checkpoint(tmp_path)
    assert same(open_checkpoint(tmp_path / "one.safetensors").weights, weights())


def test_file_and_index_that_disagree(checkpoint):
    write_tensors(checkpoint, weights(), metadata=PT, max_shard_size=16)
    with pytest.raises(InputError, match="contains both"):
        open_checkpoint(checkpoint)
    bins = folder_with(checkpoint.parent / "bins", ["pytorch_model.bin"])
    index = bins / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    with pytest.raises(InputError, match="contains both"):
        open_checkpoint(bins)


def test_file_without_tensors(tmp_path):
    write_tensors(tmp_path, {}, metadata=PT)
    with pytest.raises(InputError, match="contains no tensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff{}"])
def test_broken_config(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_by_config(checkpoint, key):
    (checkpoint / "config.json").write_text(json.dumps({key: {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=rf"quantized weights \(by the {key} in config\.json\)"):
        open_checkpoint(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({key: None}))
    open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layer.qweight", torch.int32),
        ("layer.qzeros", torch.int32),
        ("layer.SCB", torch.float32),
        ("layer.weight.absmax", torch.uint8),
        ("layer.weight.quant_state.bitsandbytes__nf4", torch.uint8),
        ("layer.weight_packed", torch.int32),
        ("layer.weight_scale_inv", torch.float32),
        ("layer.weight", torch.int8),
        ("layer.weight", torch.uint8),
        ("weight", torch.int8),
        ("layer.weight", torch.float8_e4m3fn),
        ("layer.bias", torch.float8_e5m2),
    ],
)
def test_quantized_by_tensors(tmp_path, name, dtype):
    tensors = {"a": torch.ones(2), name: torch.ones(4).to(dtype)}
    write_tensors(tmp_path, tensors, metadata=PT)
    with pytest.raises(InputError, match=rf"quantized weights \(tensor '{name}' is "):
        open_checkpoint(tmp_path)


def test_masks_and_counters_are_not_quantized_weights(tmp_path):
    tensors = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "h.0.attn.mask": torch.ones(4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4),
        "scales": torch.ones(3),
        "weight_mask": torch.ones(3, dtype=torch.bool),
    }
    write_tensors(tmp_path, tensors, metadata=PT)
    assert same(open_checkpoint(tmp_path).weights, tensors)


def test_leavings_of_a_killed_run_are_completed(checkpoint):
    checkpoint.rename(checkpoint.with_name(".checkpoint.consolidate-old"))
    assert same(open_checkpoint(checkpoint).weights, weights())
    assert os.listdir(checkpoint.parent) == ["checkpoint"]


def test_check_finite(tmp_path):
    check_finite(weights(), tmp_path)
    check_finite({}, tmp_path)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64):
            tensor = torch.ones(2, 3).to(dtype)
            tensor[1, 1:] = bad
            with pytest.raises(NonFiniteError, match=r"tensor 'b' has 2 of 6 values NaN or inf"):
                check_finite(weights() | {"b": tensor}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, dtype):
    shape = (3, 1021)  # odd, so that the last values are beside the processor's vectors
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1, 7, 63, 64, 1500, 3 * 1021 - 1):
            tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)  # the sum overflows
            check_finite({"a": tensor, "none": torch.empty(0, 3, dtype=dtype)}, tmp_path)
            tensor.view(-1)[place] = bad
            with pytest.raises(NonFiniteError, match="1 of 3063 values"):
                check_finite({"a": tensor}, tmp_path)


def test_write_keeps_all_other_files(checkpoint, tmp_path):
    keep = ["tokenizer.model", "2_Dense/model.safetensors", "onnx/model.onnx", "deep/a/b.txt"]
    drop = [
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "consolidated.safetensors",
        "fisher/fisher.json",
        "optimizer.pt",
        "rng_state_0.pth",
        "checkpoint-500/model.safetensors",
        ".git/config",
        ".gitignore",  # as dvc writes it, for the Fisher
        ".cache/huggingface/x",
        ".fisher.consolidate-new/x",
        ".consolidate-claim",  # of a folder that is a mount point
        "lost+found/x",
    ]
    folder_with(checkpoint, [*keep, *drop])
    (checkpoint / "tokenizer.model").write_bytes(b"\0\1\2")
    (checkpoint / "alias.txt").symlink_to("LICENSE")
    source = open_checkpoint(checkpoint)
    new = {name: tensor + 1 for name, tensor in source.weights.items()}
    with replace_folder(tmp_path / "out") as staging:
        write_checkpoint(staging, source, new)
    out = tmp_path / "out"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    old = ["config.json", "tokenizer.json", "LICENSE", "1_Pooling/config.json", "alias.txt"]
    assert written == {"model.safetensors", *old, *keep}
    assert (out / "tokenizer.model").read_bytes() == b"\0\1\2"
    assert not (out / "alias.txt").is_symlink()
    assert same(open_checkpoint(out).weights, new)
    assert same(open_checkpoint(checkpoint).weights, weights())
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_write_over_the_source_itself(checkpoint, monkeypatch):
    monkeypatch.setattr("formats.checkpoint.MAX_SHARD_SIZE", 16)
    source = open_checkpoint(checkpoint)
    with replace_folder(checkpoint, overwrite=True) as staging:
        write_checkpoint(staging, source, source.weights)
    again = open_checkpoint(checkpoint)
    assert same(again.weights, weights())
    assert len(again.files) == 4
    assert not (checkpoint / "model.safetensors").exists()
    assert again.config == {"model_type": "bert"}


def test_write_from_a_bare_pickle(tmp_path):
    torch.save(weights(), tmp_path / "net.pt")
    source = open_checkpoint(tmp_path / "net.pt")
    with replace_folder(tmp_path / "out") as staging:
        write_checkpoint(staging, source, source.weights)
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert same(open_checkpoint(tmp_path / "out").weights, weights())


def test_write_from_a_folder_with_a_pickle_leaves_the_pickle(tmp_path):
    folder = folder_with(tmp_path / "in", ["notes.bin"])
    torch.save(weights(), folder / "pytorch_model.bin")
    source = open_checkpoint(folder)
    with replace_folder(tmp_path / "out") as staging:
        write_checkpoint(staging, source, source.weights)
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "notes.bin"]


def test_links_out_of_the_folder_are_not_copied(checkpoint, tmp_path):
    (tmp_path / "secret").write_text("private key")
    for link, to in (("notes.txt", tmp_path / "secret"), ("up", tmp_path), ("loop", checkpoint)):
        (checkpoint / link).symlink_to(to)
        with pytest.raises(InputError, match=f"{link} is a link to"):
            with_everything(checkpoint, tmp_path / "out")
        (checkpoint / link).unlink()
        assert not (tmp_path / "out").exists()
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"config\.json is a link to"):
        open_checkpoint(checkpoint)


def with_everything(checkpoint, out) -> None:
    with replace_folder(out) as staging:
        source = open_checkpoint(checkpoint)
        write_checkpoint(staging, source, source.weights)


@pytest.mark.parametrize("shared", [False, True])
def test_snapshot_of_the_hub_cache(checkpoint, tmp_path, shared):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--mine" / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(checkpoint.rglob("*"))):
        if path.is_file():
            store = tmp_path / "blobs" / "00" if shared else blobs
            store.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, store / str(i))
            if shared:
                (blobs / str(i)).symlink_to(f"../../blobs/00/{i}")
            place = snapshot / path.relative_to(checkpoint)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blobs / str(i), place.parent))
    if shared:
        with pytest.raises(InputError, match=r"is a link to .*outside the checkpoint"):
            open_checkpoint(snapshot)
        (tmp_path / "blobs/.huggingface-shared-blobs").write_text("1\n")
    with_everything(snapshot, tmp_path / "out")
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert written == {path.relative_to(checkpoint) for path in checkpoint.rglob("*")}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert same(open_checkpoint(tmp_path / "out").weights, weights())


def test_tied_weights_given_once_are_stored_once(tmp_path):
    tied = torch.ones(2, 2)
    torch.save({"embed": tied, "head": tied}, tmp_path / "net.pt")
    source = open_checkpoint(tmp_path / "net.pt")
    with replace_folder(tmp_path / "out") as staging:
        write_checkpoint(staging, source, {"embed": source.weights["embed"]})
    assert list(open_checkpoint(tmp_path / "out").weights) == ["embed"]


def test_full_disk_harms_nothing(checkpoint, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, stderr=-3, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with_everything(checkpoint, disk / "out")
        before = weight_records(open_checkpoint(disk / "out").weights)
        (checkpoint / "corpus.txt").write_bytes(bytes(3_000_000))
        with pytest.raises(InputError, match=r"disk/other: .*full \(3,000,\d\d\d bytes needed"):
            with_everything(checkpoint, disk / "other")
        assert os.listdir(disk) == ["out"]
        assert weight_records(open_checkpoint(disk / "out").weights) == before
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_records_name_every_tensor_in_order():
    tensors = weights()
    records = weight_records(tensors)
    assert list(records) == list(tensors)
    assert records["a.bias"] == tensor_record(tensors["a.bias"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sub"])
def test_a_link_that_leads_to_itself_is_named(checkpoint, tmp_path, name):
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(name)
    with pytest.raises(InputError, match=rf"{name} is a link that leads to itself"):
        write_checkpoint(tmp_path, (opened := open_checkpoint(checkpoint)), opened.weights)


def test_a_link_to_nothing_is_not_skipped(checkpoint):
    (checkpoint / "config.json").unlink(missing_ok=True)
    (checkpoint / "config.json").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"config\.json cannot be read: No such file"):
        open_checkpoint(checkpoint)
