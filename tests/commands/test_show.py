"""`show` tells what is there; `verify` finds every damage and names the file and the tensor."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import formats.fisher_folder
from consolidate.api import show, verify
from consolidate.chain.opening import with_fisher
from consolidate.views.summary import show_text
from consolidate.views.text import verify_text
from formats.atomic import replace_folder
from formats.checkpoint import weight_records
from formats.digest import set_digest, tensor_record
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_folder import write_fisher
from formats.fisher_json import Ledger, TaskRecord, ledger_bytes, read_ledger
from support import factor_checkpoints

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def flip(file: Path, name: str) -> None:
    """Flip the lowest bit of the last value of a tensor."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    _, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + end - 4] ^= 1
    file.write_bytes(data)


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
    return tensors


FILES = {
    "model.safetensors": "hidden.weight",
    "fisher/fisher.safetensors": "output.weight",
    "fisher/anchor.safetensors": "hidden.bias",
    "fisher/heads/digits.safetensors": "output.weight",
}


def test_a_fisher_alone_is_compared_with_the_weights_that_are_named(
    golden: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = golden("anchor")
    alone, weights = tmp_path / "alone", tmp_path / "weights"
    shutil.copytree(whole / "fisher", alone / "fisher")
    weights.mkdir()
    shutil.copy(whole / "model.safetensors", weights)
    (alone / "README.md").touch()
    with pytest.raises(InputError, match=r"a Fisher but no weights.*with --base-model"):
        verify(alone)
    found = verify(alone, base_model=weights)
    expected = verify(whole) | {"checkpoint": str(alone), "base_model": str(weights)}
    assert found == expected | {"other_files": ["README.md"]}
    assert f"the weights are in {weights}: {found['weights']['digest']}" in verify_text(found)
    flip(weights / "model.safetensors", "hidden.weight")
    with pytest.raises(InputError, match=r"weights/model\.safetensors: 'hidden\.weight'") as wrong:
        verify(alone, base_model=weights)
    assert "does not have the weights that the Fisher in" in str(wrong.value)
    with pytest.raises(UsageError, match="is not an adapter: leave --base-model out"):
        verify(whole, base_model=weights)


def test_what_is_whole_passes(golden: Callable[[str], Path]) -> None:
    found = verify(golden("anchor"))
    assert found["tasks"] == ["digits", "zahlen-2.0_b"]
    assert found["fisher"] == {
        "tensors": 3,
        "bytes": 84,
        "digest": "ec9dd5eea2e6d786fbeac5e6dd33482a97da00a7fe35ea88d87d3567323538a8",
    }
    assert found["heads"]["digits"]["tensors"] == found["weights"]["tensors"] - 4 == 1
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit(golden: Callable[[str], Path], file: str) -> None:
    folder, name = golden("anchor"), FILES[file]
    flip(folder / file, name)
    with pytest.raises(InputError) as caught:
        verify(folder)
    assert f"{folder / file}: '{name}' has the expected dtype and shape, but other values" in str(
        caught.value
    )
    assert str(caught.value).count(".safetensors") == 1


@pytest.mark.parametrize("kind", ["model", "fisher/fisher", "fisher/anchor"])
def test_one_flipped_bit_in_a_shard(golden: Callable[[str], Path], kind: str) -> None:
    folder = golden("sharded")
    index = json.loads((folder / f"{kind}.safetensors.index.json").read_text())
    shard = (folder / kind).parent / index["weight_map"]["output.weight"]
    flip(shard, "output.weight")
    with pytest.raises(InputError) as caught:
        verify(folder)
    assert f"{shard}: 'output.weight'" in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_renamed_tensor(golden: Callable[[str], Path], file: str) -> None:
    folder, name = golden("anchor"), FILES[file]
    rewrite(folder / file, lambda tensors: tensors.update(new=tensors.pop(name)))
    with pytest.raises(InputError) as caught:
        verify(folder)
    where = "consolidate remap" if file == "model.safetensors" else Path(file).name
    for part in (where, repr(name), "'new'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_dtype(golden: Callable[[str], Path], file: str, dtype: torch.dtype) -> None:
    folder, name = golden("anchor"), FILES[file]
    rewrite(folder / file, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(InputError, match=f"'{name}' has dtype F[16][64]?, expected F32") as caught:
        verify(folder)
    assert Path(file).name in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_and_an_extra_tensor(golden: Callable[[str], Path], file: str) -> None:
    folder, name = golden("anchor"), FILES[file]
    rewrite(
        folder / file, lambda tensors: tensors.update(extra=torch.full_like(tensors.pop(name), 0.3))
    )
    with pytest.raises(
        InputError, match=f"'{name}' is missing.*'extra' was not expected"
    ) as caught:
        verify(folder)
    assert Path(file).name in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(golden: Callable[[str], Path], file: str) -> None:
    folder = golden("anchor")
    (folder / file).unlink()
    with pytest.raises(InputError) as caught:
        verify(folder)
    stem = Path(file).name if file != "model.safetensors" else str(folder)
    assert stem in str(caught.value)


def test_a_stray_file(golden: Callable[[str], Path]) -> None:
    folder = golden("anchor")
    (folder / "fisher" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"fisher/model\.safetensors is not part of"):
        verify(folder)


def set_value(folder: Path, file: str, value: float) -> None:
    """Put a value into a tensor and correct the ledger, as a faulty writer would have."""
    name = FILES[file]

    def change(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[1] = value

    tensors = rewrite(folder / file, change)
    path = folder / "fisher" / "fisher.json"
    ledger = read_ledger(path)
    records = {key: tensor_record(values) for key, values in tensors.items()}
    kind = Path(file).stem
    if kind in ("fisher", "anchor"):
        ledger = replace(ledger, **{kind: records})
    else:
        ledger = replace(ledger, heads={kind: records})
    path.write_bytes(ledger_bytes(ledger))


@pytest.mark.parametrize("file", [file for file in FILES if file != "model.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(golden: Callable[[str], Path], file: str, value: float) -> None:
    folder = golden("anchor")
    set_value(folder, file, value)
    with pytest.raises(NonFiniteError) as caught:
        verify(folder)
    assert f"{folder / file}: '{FILES[file]}' has 1 of" in str(caught.value)
    assert "NaN or infinite" in str(caught.value)


def test_a_nan_that_is_damage_too_is_told_as_both(golden: Callable[[str], Path]) -> None:
    folder = golden("anchor")

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["hidden.weight"][0, 0] = torch.nan

    rewrite(folder / "model.safetensors", spoil)
    with pytest.raises(InputError, match=r"'hidden\.weight' has 1 of 12 values NaN.*other values"):
        verify(folder)


def test_negative_values(golden: Callable[[str], Path]) -> None:
    folder = golden("anchor")
    set_value(folder, "fisher/fisher.safetensors", -1e-30)
    for read in (verify, with_fisher):
        with pytest.raises(InputError, match=r"fisher.* 'output\.weight' has 1 .*below 0"):
            read(folder)
    anchored = golden("sharded")
    assert verify(anchored)["anchor"]["tensors"] == 3  # μ may be negative


def test_all_findings_are_told_but_not_endlessly(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    theta = {f"w{i:02}": torch.full((2,), float(i)) for i in range(12)}
    folder.mkdir()
    save_file(theta, folder / "model.safetensors", {"format": "pt"})
    write(folder, theta)
    save_file({k: v + 1 for k, v in theta.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"'w00' .*'w04' .*and 7 more"):
        verify(folder)


def write(folder: Path, theta: dict[str, torch.Tensor], **task: Any) -> None:
    """Write a Fisher folder of |θ| beside weights."""
    fields: dict[str, Any] = {
        "name": "t",
        "objective": "classification",
        "likelihood": "softmax",
        "labels": None,
        "unit": "example",
        "examples": 1,
        "units": 1,
        "estimator": "exact",
        "mc_samples": None,
        "seed": 0,
        "data": "x.csv",
    }
    write_fisher(
        folder / "fisher",
        {name: values.float().abs() for name, values in theta.items()},
        Ledger(
            [TaskRecord(**(fields | task))],
            weights={name: tensor_record(values) for name, values in theta.items()},
        ),
    )


def test_a_checkpoint_without_a_fisher(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    for command in (show, verify):
        with pytest.raises(InputError, match="measure it with `consolidate fisher`"):
            command(tmp_path)
    with pytest.raises(InputError):
        verify(tmp_path / "none")


def test_files_that_no_digest_covers_are_told(golden: Callable[[str], Path]) -> None:
    folder = golden("anchor")
    assert verify(folder)["other_files"] == ["config.json"]
    (folder / "sub" / "fisher").mkdir(parents=True)
    for name in ("model-00009-of-00009.safetensors", "sub/fisher/x.json", ".hidden"):
        (folder / name).write_bytes(b"")
    (folder / "up").symlink_to(folder)
    assert verify(folder)["other_files"] == [
        "config.json",
        "model-00009-of-00009.safetensors",
        "sub/fisher/x.json",
    ]


def test_a_ledger_whose_traces_are_not_those_of_the_fisher(golden: Callable[[str], Path]) -> None:
    folder = golden("unsharded")
    path = folder / "fisher" / "fisher.json"
    ledger = read_ledger(path)
    ledger.tasks[0].layers["hidden.bias"].trace = 5.0
    path.write_bytes(ledger_bytes(ledger))
    with pytest.raises(InputError, match=r"fisher\.json: .*'hidden\.bias'.* found 4\.25"):
        verify(folder)


def test_checkpoints_that_descend_from_each_other(tmp_path: Path) -> None:
    theta = {"w": torch.ones(2)}
    for name, value in (("one", 1.0), ("two", 1.0), ("three", 2.0)):
        (tmp_path / name).mkdir()
        values = {"w": torch.full((2,), value)}
        save_file(values, tmp_path / name / "model.safetensors", {"format": "pt"})
        write(tmp_path / name, values)
    found = verify(tmp_path / "one", tmp_path / "two")
    assert found["later"] == [verify(tmp_path / "two") | {"descends_by": "weights"}]
    with pytest.raises(InputError, match=r"three/fisher/fisher\.json does not descend from .*two"):
        verify(tmp_path / "one", tmp_path / "two", tmp_path / "three")
    save_file(theta, tmp_path / "three" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"three/model\.safetensors: 'w' has"):
        verify(tmp_path / "one", tmp_path / "three")


def test_a_pickle_of_weights_is_verified_too(tmp_path: Path) -> None:
    theta = {"w": torch.arange(4.0), "v": torch.ones(2)}
    torch.save(theta, tmp_path / "pytorch_model.bin")
    write(tmp_path, theta)
    assert verify(tmp_path)["weights"] == {
        "tensors": 2,
        "bytes": 24,
        "digest": set_digest(weight_records(theta)),
    }
    torch.save(theta | {"w": -theta["w"]}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: 'w' has the expected"):
        verify(tmp_path)


def test_show_counts_and_ranks(tmp_path: Path) -> None:
    theta = {
        "small": torch.tensor([1.0, 1.0]),
        "big": torch.tensor([[4.0, 2.0]]),
        "none": torch.zeros(3),
    }
    write(tmp_path, theta)
    found = show(tmp_path, top=2)
    assert found["fisher"]["trace"] == 8
    assert found["fisher"]["values"] == 7
    big = {"shape": [1, 2], "trace": 6.0, "mean": 3.0, "max": 4.0, "share": 0.75}
    small = {"shape": [2], "trace": 2.0, "mean": 1.0, "max": 1.0, "share": 0.25}
    assert found["parameters"] == [
        {"name": "big", **big, "factor": None},
        {"name": "small", **small, "factor": None},
    ]
    assert found["parameters_left_out"] == 1
    json.dumps(found, allow_nan=False)
    assert "and 1 more" in show_text(found)
    assert "75.0%" in show_text(found)


def test_show_of_nothing_but_zeros_and_empty_tensors(tmp_path: Path) -> None:
    write(tmp_path, {"zero": torch.zeros(2), "empty": torch.zeros(0, 3)})
    found = show(tmp_path)
    assert [parameter["share"] for parameter in found["parameters"]] == [0.0, 0.0]
    show_text(found)


def test_show_tells_metrics_and_what_is_not_protected(golden: Callable[[str], Path]) -> None:
    text = show_text(show(golden("anchor")))
    assert "zahlen-2.0_b" in text
    assert "epoch 1" not in text
    assert "a buffer: it has no gradient: norm.num_batches_tracked, norm.running_mean" in text
    assert "penalty offset 0.03125" in text


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = "w\x1b[2J\r\n\u202e\u2028\x9b" + "y" * 500
    write(
        tmp_path,
        {evil: torch.ones(2)},
        objective="o\x1b]0;title\x07",
        data="d\nd",
        metrics={"after": {"e\x1bv": {"m\x08": 1.0}}},
    )
    text = show_text(show(tmp_path))
    for line in text.splitlines():
        assert line.isprintable()
        assert len(line) < 250
    assert r"w\x1b[2J\r\n\u202e\u2028\x9byyy" in text
    assert r"d\nd" in text


def test_show_tells_the_overlap_of_two_fishers_by_layer(tmp_path: Path) -> None:
    one = {
        "first.weight": torch.tensor([[1.0, 3.0]]),
        "first.bias": torch.tensor([4.0]),
        "last.weight": torch.tensor([[2.0]]),
        "bare": torch.tensor([1.0, 0.0]),
    }
    other = {
        "first.weight": torch.tensor([[5.0, 0.0]]),
        "first.bias": torch.tensor([1.0]),
        "last.weight": torch.tensor([[9.0]]),
        "bare": torch.tensor([0.0, 1.0]),
        "head.weight": torch.tensor([1.0]),
    }
    for name, theta in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, theta)
    found = show(tmp_path / "one", overlap=tmp_path / "other")
    # weight and bias of a layer are scaled to unit trace together
    first = (5**0.5 + 4**0.5) / (8 * 6) ** 0.5
    overlaps = {layer["name"]: layer["overlap"] for layer in found["overlap"]["layers"]}
    assert overlaps == pytest.approx({"first": first, "last": 1.0, "bare": 0.0}, abs=1e-7)
    assert found["overlap"]["left_out"] == ["head.weight"]
    text = show_text(found)
    assert f"{first:.3f}" in text
    assert "in only one of the two: head.weight" in text
    assert show(tmp_path / "one")["overlap"] is None


def test_an_overlap_needs_two_of_one_architecture(tmp_path: Path) -> None:
    thetas = {"one": {"w": 2}, "other": {"v": 2}, "wider": {"w": 3}}
    for folder, sizes in thetas.items():
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, {name: torch.ones(size) for name, size in sizes.items()})
    with pytest.raises(InputError, match=r"share no parameter \('w', 'v'\)"):
        show(tmp_path / "one", overlap=tmp_path / "other")
    with pytest.raises(InputError, match=r"'w' has shape \(2,\) in .* and \(3,\) in"):
        show(tmp_path / "one", overlap=tmp_path / "wider")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: expected a checkpoint folder, found a file"):
        show(tmp_path / "one", overlap=tmp_path / "file")


@pytest.mark.parametrize("read", [show, verify])
def test_a_checkpoint_that_is_replaced_while_it_is_read(
    golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    folder, other = golden("anchor"), golden("unsharded")
    expected = read(other) | {"checkpoint": str(folder)}
    original, left = formats.fisher_folder.open_tensors, 2

    def replacing(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            with replace_folder(folder, overwrite=True) as staging:
                shutil.copytree(other, staging, dirs_exist_ok=True)
        return original(*arguments)

    monkeypatch.setattr(formats.fisher_folder, "open_tensors", replacing)
    assert read(folder) == expected
    assert left < 0
    flip(folder / "model.safetensors", "hidden.weight")
    with pytest.raises(InputError, match="other values"):
        verify(folder)


DAMAGED_FACTORS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "asymmetric": (
        lambda tensors: tensors["0.weight.R"][0, 1].add_(1.0),
        r"factors\.safetensors: '0\.weight\.R' is not symmetric",
    ),
    "a negative eigenvalue": (
        lambda tensors: tensors["0.weight.R"].sub_(0.2).diagonal().add_(0.2),
        r"factors\.safetensors: '0\.weight\.R' has an eigenvalue below -",
    ),
    "a negative diagonal": (
        lambda tensors: tensors["0.weight.R"][0, 0].neg_(),
        r"factors\.safetensors: '0\.weight\.R' has values below 0 on its diagonal",
    ),
    "another scale": (
        lambda tensors: tensors["2.weight.R"].mul_(2),
        r"'2\.weight\.R': expected the trace 1\.\d+, that of the Fisher of 2\.weight and 2\.bias",
    ),
}


@pytest.mark.parametrize("what", DAMAGED_FACTORS)
def test_factors_that_no_sum_of_squares_can_be(tmp_path: Path, what: str) -> None:
    folder = factor_checkpoints.write(tmp_path / "a")
    verify(folder)
    change, message = DAMAGED_FACTORS[what]
    factor_checkpoints.rewrite(folder, change, "factors")
    with pytest.raises(InputError, match=message):
        verify(folder)


def test_factors_that_are_not_finite(tmp_path: Path) -> None:
    folder = factor_checkpoints.write(tmp_path / "a", anchored=True)
    for kind, name in (("factors", "0.weight.R"), ("factor_anchor", "0.bias")):
        factor_checkpoints.rewrite(folder, lambda t, n=name: t[n].fill_(torch.nan), kind)
        with pytest.raises(NonFiniteError, match=rf"{kind}\.safetensors: '{name}' has"):
            verify(folder)
        shutil.rmtree(folder)
        factor_checkpoints.write(folder, anchored=True)


@pytest.mark.parametrize("kind", ["factors", "factor_anchor"])
def test_a_damaged_a_missing_and_another_models_factor_file(tmp_path: Path, kind: str) -> None:
    folder = factor_checkpoints.write(tmp_path / "a", anchored=True)
    other = factor_checkpoints.write(tmp_path / "b", seed=1, anchored=True)
    file, name = folder / "fisher" / f"{kind}.safetensors", "0.weight"
    name += ".R" * (kind == "factors")
    flip(file, name)
    with pytest.raises(InputError) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{file}: '{name}' has the expected dtype and shape, but other values"
    )
    shutil.copy(other / "fisher" / file.name, file)
    with pytest.raises(InputError, match=rf"{kind}\.safetensors, metadata: expected weights '"):
        verify(folder)
    file.unlink()
    with pytest.raises(InputError, match=rf"expected {kind}\.safetensors or .*, found neither"):
        verify(folder)


def test_factors_are_counted_and_shown(tmp_path: Path) -> None:
    folder = factor_checkpoints.write(tmp_path / "a", without=("2.weight.R",), anchored=True)
    checked = verify(folder)
    assert (checked["factors"]["tensors"], checked["factors"]["bytes"]) == (1, 7 * 7 * 4)
    assert (checked["factor_anchor"]["tensors"], checked["factor_anchor"]["bytes"]) == (2, 56 * 4)
    assert "factor anchor: 2 tensors, 224 bytes" in verify_text(checked)
    found = show(folder)
    factors = found["factors"]
    assert factors is not None
    assert factors["digest"] == checked["factors"]["digest"]
    assert (factors["values"], factors["bytes"], factors["offset"]) == (56, 196, 0.5)
    assert factors["anchor"] == "fisher/factor_anchor"
    [matrix] = factors["matrices"]
    assert matrix["parameters"] == ["0.weight", "0.bias"]
    assert matrix["share"] == factors["share"]
    shares = {each["name"]: (each["factor"], each["share"]) for each in found["parameters"]}
    assert sum(share for at, share in shares.values() if at) == pytest.approx(factors["share"])
    assert {name for name, (at, _) in shares.items() if at == "0.weight.R"} == {
        "0.weight",
        "0.bias",
    }
    text = show_text(found)
    assert "factors: 1 matrix of F32, 196 bytes, for 56 of the values," in text
    assert re.search(r"^0\.weight .* R 7×7, 196 bytes$", text, re.MULTILINE)
    assert re.search(r"^2\.weight .* diagonal$", text, re.MULTILINE)
    compared = show_text(show(folder, overlap=folder))
    assert compared.endswith("the overlap is that of the diagonals; factors are not compared")


def test_without_factors_nothing_is_said_of_them(golden: Callable[[str], Path]) -> None:
    found = show(golden("anchor"))
    assert found["factors"] is None
    assert {each["factor"] for each in found["parameters"]} == {None}
    assert "protected by" not in show_text(found)
    assert "factors:" not in show_text(found)
    assert "of the diagonals" not in show_text(show(golden("unsharded"), overlap=golden("sharded")))
