"""The Fisher folder: written only if it can be read, read only if it is what its ledger says."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats import fisher_json
from formats.atomic import replace_folder
from formats.checkpoint import weight_records
from formats.digest import TensorRecord
from formats.errors import InputError, NonFiniteError
from formats.fisher_folder import (
    METADATA_KEY,
    check_belongs,
    check_intact,
    read_fisher,
    write_fisher,
)
from formats.fisher_json import Block, Ledger, TaskRecord, ledger_bytes, needed_version

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def weights() -> dict[str, Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(3.0).bfloat16(),
        "n": torch.tensor(5),
    }


def fisher() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(3, 2).T / 4, "b": torch.tensor([0.0, 1e-30, 3e38])}


def ledger(**changes: Any) -> Ledger:
    task = TaskRecord(
        "t", "classification", "softmax", None, "example", 1, 1, "exact", None, 0, data="x.csv"
    )
    return Ledger(
        **({"tasks": [task], "weights": weight_records(weights()), "unprotected": {"n": "a buffer"}}
           | changes)
    )  # fmt: skip


def write(folder: Path, **options: Any) -> Path:
    write_fisher(
        folder, options.pop("fisher", fisher()), options.pop("ledger", ledger()), **options
    )
    return folder


def with_factors(**changes: Any) -> dict[str, Any]:
    blocks = {"a.R": Block("R", (1,), ("a",)), "a.G": Block("G", (0,), ("a",))}
    factors = {"a.R": torch.ones(3, 3), "a.G": torch.tensor([[2.0, -1.0], [-1.0, 0.0]])}
    return {"ledger": ledger(blocks=blocks), "factors": factors | changes}


@pytest.fixture
def golden(tmp_path: Path) -> Any:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name / "fisher", tmp_path / "fisher"))

    return copy


@pytest.mark.parametrize("max_shard_size", [10**9, 24])
def test_what_is_written_comes_back(tmp_path: Path, max_shard_size: int) -> None:
    given = ledger()
    anchor = {"a": weights()["a"].double() / 3, "b": weights()["b"]}
    heads = {"t": {"out": torch.ones(4, 2, dtype=torch.float16)}}
    with replace_folder(tmp_path / "fisher") as staging:
        written = write_fisher(
            staging, fisher(), given, anchor=anchor, heads=heads, max_shard_size=max_shard_size
        )
    assert given == ledger()
    stored = read_fisher(tmp_path / "fisher")
    assert stored.ledger == written
    assert list(stored.fisher) == ["a", "b"]
    for name, values in fisher().items():
        assert torch.equal(stored.fisher[name], values)
        assert stored.anchor is not None
        assert torch.equal(stored.anchor[name], anchor[name].float())
    assert torch.equal(stored.heads["t"]["out"], heads["t"]["out"])
    assert len(stored.fisher.files) == (1 if max_shard_size > 100 else 2)
    check_belongs(stored, weights(), "model.safetensors")
    for file in (tmp_path / "fisher").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            (text,) = handle.metadata().values()
        content = json.loads(text)
        assert list(content) == ["kind", "version", "weights"]
        assert content["kind"] == ("head" if file.parent.name == "heads" else file.name[:6])


def test_the_bytes_depend_on_nothing_else(tmp_path: Path) -> None:
    one, other = write(tmp_path / "1"), write(tmp_path / "2")
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_bfloat16(tmp_path: Path) -> None:
    stored = read_fisher(write(tmp_path / "fisher", dtype=torch.bfloat16))
    assert {record.dtype for record in stored.ledger.fisher.values()} == {"BF16"}
    assert torch.equal(stored.fisher["a"], fisher()["a"].bfloat16())


@pytest.mark.parametrize("max_shard_size", [10**9, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_come_back(tmp_path: Path, max_shard_size: int, dtype: torch.dtype) -> None:
    given = with_factors() | {"factor_anchor": {"a": weights()["a"] / 3}}
    given["ledger"].factor_offset = 0.25
    folder = write(tmp_path / "fisher", max_shard_size=max_shard_size, dtype=dtype, **given)
    stored = read_fisher(folder)
    assert stored.factors is not None
    assert stored.factor_anchor is not None
    assert torch.equal(stored.factor_anchor["a"], given["factor_anchor"]["a"])
    assert stored.ledger.factor_offset == 0.25
    assert needed_version(stored.ledger) == 2
    assert stored.ledger.blocks == given["ledger"].blocks
    for name, values in given["factors"].items():
        assert torch.equal(stored.factors[name], values)
    check_intact(stored)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            (text,) = handle.metadata().values()
        content = json.loads(text)
        assert content["version"] == 2
        assert content["kind"] in file.name


def test_damaged_factors_are_refused(golden: Any) -> None:
    folder = golden("version-2")
    index = folder / "factors.safetensors.index.json"
    name = "output.weight.G"
    file = folder / json.loads(index.read_text())["weight_map"][name]
    whole = load_file(file)[name]
    rewrite(file, **{name: whole + torch.eye(2)})
    stored = read_fisher(folder)
    with pytest.raises(InputError, match=r"is damaged: 'output\.weight\.G' has .* other values"):
        check_intact(stored)
    check_intact(stored, kinds=("fisher",))
    rewrite(file, **{name: torch.ones(3, 3)})
    with pytest.raises(InputError, match=r"'output\.weight\.G' has shape \[3, 3\], expected"):
        read_fisher(folder)
    rewrite(file, **{name: whole}, metadata={METADATA_KEY: '{"kind":"factors","version":1}'})
    with pytest.raises(InputError, match=r"expected version 2 as in fisher\.json, found 1"):
        read_fisher(folder)


def test_a_reader_of_the_diagonal_alone_refuses_factors_by_their_version(
    golden: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_json, "VERSIONS", (1, 1))
    with pytest.raises(InputError, match=r"found 2; try a newer release of consolidate"):
        read_fisher(golden("version-2-factors"))


@pytest.mark.parametrize(
    ("bad", "options", "error", "message"),
    [
        ({}, {"ledger": ledger(), "factors": {"a.R": torch.ones(3, 3)}}, InputError, "same names"),
        ({}, with_factors(**{"a.R": torch.ones(2, 2)}), InputError, r"shape \[3, 3\], found"),
        ({}, with_factors(**{"a.R": torch.ones(3, 2)}), InputError, r"'a\.R' is not symmetric"),
        ({}, with_factors(**{"a.R": torch.ones(3)}), InputError, r"'a\.R' is not symmetric"),
        ({}, with_factors(**{"a.R": torch.ones(3, 3).triu()}), InputError, "is not symmetric"),
        ({}, with_factors(**{"a.R": -torch.ones(3, 3)}), InputError, "below 0 on its diagonal"),
        ({}, with_factors(**{"a.R": torch.ones(3, 3) / 0}), NonFiniteError, "'a.R' has 9 of 9"),
        ({}, with_factors() | {"factors": None}, InputError, "the same names"),
        (
            {},
            {"ledger": ledger(factors={"a.R": TensorRecord("F32", (3, 3), "0" * 64)})},
            InputError,
            "the ledger lists factors, but `factors` is None",
        ),
        ({"b": torch.tensor([0, -1e-30, 1])}, {}, InputError, "'b' has 1 of 3 values below 0"),
        ({"b": torch.tensor([0, torch.nan, torch.inf])}, {}, NonFiniteError, "'b' has 2 of 3"),
        ({"b": torch.tensor([0, 1, 1e39]).double()}, {}, NonFiniteError, "'b' has 1 of 3"),
        (
            {"b": torch.tensor([0, 1, 3.4e38])},
            {"dtype": torch.bfloat16},
            NonFiniteError,
            "'b' has 1 of 3",
        ),
        ({"b": torch.ones(4)}, {}, InputError, r"'b': expected .* shape \[3\], found \[4\]"),
        ({"x": torch.ones(4)}, {}, InputError, "'x' is not among the weights"),
        ({"n": torch.ones(())}, {}, InputError, "'n': its weight is I64"),
        ({"b": torch.ones(3).long()}, {}, InputError, "'b': expected F32 or BF16, found I64"),
        ({}, {"dtype": torch.float16}, InputError, "stored as F32 or BF16, not as F16"),
        ({}, {"anchor": {"a": weights()["a"]}}, InputError, "'b' is in only one of"),
        ({}, {"anchor": {"a": torch.ones(2, 3) / 0}}, NonFiniteError, "anchor of 'a' has 6"),
        ({}, {"heads": {"u": {"o": torch.ones(1)}}}, InputError, "'u' is not a task"),
        ({}, {"heads": {"t": {"o": torch.ones(1) / 0}}}, NonFiniteError, "t of 'o' has 1"),
        ({}, {"ledger": ledger(unprotected={})}, InputError, "'n' has neither"),
        (
            {},
            {"ledger": ledger(heads={"t": {"o": TensorRecord("F32", (1,), "0" * 64)}})},
            InputError,
            "a head of task 't', but `heads` has none",
        ),
    ],
)  # fmt: skip
def test_what_may_not_be_is_not_written(
    tmp_path: Path, bad: dict[str, Tensor], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        write(tmp_path / "fisher", fisher=fisher() | bad, **options)
    assert not (tmp_path / "fisher").exists()


def test_a_missing_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fisher does not exist: .*`consolidate fisher`"):
        read_fisher(tmp_path / "fisher")


@pytest.mark.parametrize("name", ["unsharded", "sharded", "anchor", "version-2"])
def test_each_missing_or_truncated_file_is_named(golden: Any, name: str) -> None:
    folder = golden(name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for file in files:
        data = file.read_bytes()
        for length in (None, 0, 7, len(data) // 2, len(data) - 2):
            if length is None:
                file.unlink()
            else:
                file.write_bytes(data[:length])
            with pytest.raises(InputError) as caught:
                read_fisher(folder)
            assert file.name in str(caught.value)
        file.write_bytes(data)
    read_fisher(folder)


@pytest.mark.parametrize(
    "stray",
    [
        "notes.txt",
        "anchor.safetensors",
        "factors.safetensors",
        "model.safetensors",
        "fisher.bin",
        "fisher-00001-of-00002.safetensors",
        "fisher.json.bak",
        "heads/t.safetensors",
        "folder/x",
    ],
)
def test_stray_files_are_refused(golden: Any, stray: str) -> None:
    folder = golden("unsharded")
    (folder / stray).parent.mkdir(exist_ok=True)
    (folder / stray).write_bytes(b"")
    with pytest.raises(InputError, match=f"{stray.split('/')[0]}.* is not part of"):
        read_fisher(folder)


def test_stray_heads_and_indexes_are_refused(golden: Any) -> None:
    folder = golden("anchor")
    (folder / "heads" / "other.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"heads/other\.safetensors is not part of"):
        read_fisher(folder)


def test_hidden_files_are_ignored(golden: Any) -> None:
    folder = golden("unsharded")
    (folder / ".DS_Store").write_bytes(b"x")
    read_fisher(folder)


def rewrite(file: Path, metadata: dict[str, str] | None = None, **changes: Tensor | None) -> None:
    """Write a tensor file anew, some tensors changed, and its metadata kept unless given."""
    with safe_open(file, framework="pt") as handle:
        kept = handle.metadata()
    tensors: dict[str, Any] = load_file(file) | changes
    save_file(
        {name: values for name, values in tensors.items() if values is not None},
        file,
        kept if metadata is None else metadata,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden.bias": torch.ones(4)}, r"'hidden\.bias' has shape \[4\], expected \[3\]"),
        ({"hidden.bias": torch.ones(3).half()}, r"'hidden\.bias' has dtype F16, expected F32"),
        ({"hidden.bias": None}, r"'hidden\.bias' is missing"),
        ({"extra": torch.ones(3)}, "'extra' was not expected"),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused(
    golden: Any, changes: dict[str, Tensor | None], message: str
) -> None:
    folder = golden("unsharded")
    rewrite(folder / "fisher.safetensors", **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_fisher(folder)
    assert "fisher.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "exactly one metadata key"),
        ({"format": "pt"}, r"exactly one metadata key, 'consolidate-fisher', found \['format'\]"),
        ({METADATA_KEY: "{}", "format": "pt"}, "exactly one metadata key"),
        ({METADATA_KEY: "{"}, "metadata: expected"),
        ({METADATA_KEY: "[" * 100_000}, "metadata: expected"),
        ({METADATA_KEY: "{}"}, "kind 'fisher' .*found None"),
        ({METADATA_KEY: '{"kind":"anchor"}'}, "kind 'fisher' .*found 'anchor'"),
        ({METADATA_KEY: '{"kind":"fisher","version":2}'}, "version 1 .*found 2"),
        (
            {METADATA_KEY: '{"kind":"fisher","version":1,"weights":"00"}'},
            "weights '1cd5.*found '00'",
        ),
    ],
)
def test_other_metadata_is_refused(golden: Any, metadata: dict[str, str], message: str) -> None:
    folder = golden("unsharded")
    rewrite(folder / "fisher.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=message) as caught:
        read_fisher(folder)
    assert "fisher.safetensors" in str(caught.value)


def test_the_metadata_of_every_shard_is_read(golden: Any) -> None:
    folder = golden("sharded")
    rewrite(folder / "fisher-00002-of-00002.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"fisher-00002-of-00002\.safetensors: expected ex"):
        read_fisher(folder)


def test_shards_have_the_names_of_the_format(golden: Any) -> None:
    folder = golden("sharded")
    index = folder / "fisher.safetensors.index.json"
    (folder / "fisher-00002-of-00002.safetensors").rename(folder / "model.safetensors")
    index.write_text(index.read_text().replace("fisher-00002-of-00002", "model"))
    with pytest.raises(InputError, match=r"2 shards, with .*00002-of-00002.*, found model\.saf"):
        read_fisher(folder)
    (folder / "model.safetensors").rename(folder / "fisher-00003-of-00003.safetensors")
    index.write_text(index.read_text().replace('"model.', '"fisher-00003-of-00003.'))
    with pytest.raises(InputError, match=r"00002-of-00002.*, found fisher-00003-of-00003"):
        read_fisher(folder)


def test_an_index_cannot_lead_out_of_the_folder(golden: Any) -> None:
    folder = golden("sharded")
    index = folder / "fisher.safetensors.index.json"
    shutil.move(folder / "fisher-00002-of-00002.safetensors", folder.parent)
    for name in ("../", str(folder.parent) + "/"):
        text = index.read_text().replace('"fisher-00002', f'"{name}fisher-00002')
        index.write_text(text)
        with pytest.raises(InputError, match="fisher-00002-of-00002"):
            read_fisher(folder)


def test_the_folder_may_be_of_links_as_in_the_cache_of_the_hub(golden: Any, tmp_path: Path) -> None:
    folder = golden("anchor")
    snapshot = tmp_path / "repo" / "snapshots" / "0" / "fisher"
    blobs = tmp_path / "repo" / "blobs"
    (snapshot / "heads").mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        blob = blobs / str(number)
        shutil.move(file, blob)
        link = snapshot / file.relative_to(folder)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert read_fisher(snapshot).ledger.tasks


@pytest.mark.parametrize("name", ["fisher.json", "fisher.safetensors", "heads"])
def test_a_link_that_leads_out_is_refused(golden: Any, tmp_path: Path, name: str) -> None:
    folder = golden("anchor")
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} is a link to .*elsewhere, outside"):
        read_fisher(folder)


def test_an_index_that_is_a_link_out_is_refused(golden: Any, tmp_path: Path) -> None:
    index = golden("sharded") / "fisher.safetensors.index.json"
    shutil.move(index, tmp_path / "elsewhere")
    index.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"index\.json is a link to .*elsewhere, outside"):
        read_fisher(index.parent)


def test_other_weights_are_told_by_tensor(golden: Any) -> None:
    stored = read_fisher(golden("unsharded"))
    mine = load_file(GOLDEN / "unsharded" / "model.safetensors")
    check_belongs(stored, mine, "mine")
    with pytest.raises(
        InputError, match=r"does not belong to the weights of mine: .*'hidden\.bias' .*other values"
    ) as e:
        check_belongs(stored, mine | {"hidden.bias": torch.zeros(3)}, "mine")
    assert "output.weight" not in str(e.value)
    with pytest.raises(InputError, match=r"'output\.weight' has shape \[3, 2\]"):
        check_belongs(stored, mine | {"output.weight": mine["output.weight"].T}, "mine")
    renamed = {name.replace("hidden", "h"): values for name, values in mine.items()}
    with pytest.raises(InputError, match=r"under other names \('hidden\.bias' is now 'h\.bias'"):
        check_belongs(stored, renamed, "mine")
    with pytest.raises(InputError, match=r"and 23 more"):
        check_belongs(stored, {f"x{i}": torch.ones(1) for i in range(20)}, "mine")


def test_a_ledger_of_other_files_is_refused(golden: Any) -> None:
    folder = golden("unsharded")
    stored = read_fisher(folder)
    shapes = dict(stored.ledger.weights)
    shapes["norm.running_mean"] = TensorRecord("F32", (3,), "0" * 64)
    stored.ledger.weights = shapes
    (folder / "fisher.json").write_bytes(ledger_bytes(stored.ledger))
    with pytest.raises(InputError, match="the files come from different runs"):
        read_fisher(folder)
