"""Laws of the files: what is written is read back, and a digest knows nothing of the shards."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats.digest import set_digest, tensor_record
from formats.fisher_folder import read_fisher, write_fisher
from formats.fisher_json import Ledger, TaskRecord
from formats.tensors import open_tensors, write_tensors

LAWS = settings(max_examples=30)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
SHAPES = st.lists(st.integers(0, 4), max_size=3)
SHARD_SIZES = st.integers(1, 200)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bytes as a tensor, NaNs and negative zeros among them."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    count = int(torch.tensor(shape).prod())
    if dtype == torch.bool:
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(values, dtype=dtype).reshape(shape)
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    return torch.tensor([*data], dtype=torch.uint8).view(dtype).reshape(shape)


SETS = st.dictionaries(NAMES, tensors(), min_size=1, max_size=6)


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and flat[0].equal(flat[1])


def digest(tensors: dict[str, Tensor]) -> str:
    return set_digest({name: tensor_record(tensor) for name, tensor in tensors.items()})


@LAWS
@given(SETS, SHARD_SIZES)
def test_tensors_are_read_as_written_whatever_the_shards(
    written: dict[str, Tensor], shard_size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder), written, metadata={"format": "pt"}, max_shard_size=shard_size)
        found = open_tensors(Path(folder))
        assert set(found) == set(written)
        assert all(same_bytes(found[name], tensor) for name, tensor in written.items())
        assert digest(dict(found)) == digest(written)


@LAWS
@given(SETS, st.data())
def test_a_digest_depends_on_names_dtypes_shapes_and_bytes_alone(
    one: dict[str, Tensor], data: st.DataObject
) -> None:
    order = data.draw(st.permutations([*one]))
    assert digest({name: one[name].clone() for name in order}) == digest(one)
    strided = {n: t.unsqueeze(-1).expand(*t.shape, 2)[..., 0] for n, t in one.items()}
    assert digest(strided) == digest(one)
    name = data.draw(st.sampled_from(order))
    changed = [{**one, name: one[name].unsqueeze(0)}, {n: t for n, t in one.items() if n != name}]
    if one[name].numel() and one[name].dtype != torch.bool:
        flipped = one[name].clone()
        flipped.reshape(-1).view(torch.uint8)[-1] ^= 1
        changed.append({**one, name: flipped})
    for other in changed:
        assert digest(other) != digest(one)


TASK = TaskRecord("t", "classification", "softmax", None, "example", 1, 1, "exact", None, 0)
POSITIVE = st.floats(0, 2.0**99, width=32, allow_subnormal=False)  # as commands flush them
FISHERS = st.dictionaries(
    NAMES, st.lists(POSITIVE, min_size=1, max_size=5).map(torch.tensor), min_size=1, max_size=4
)


@LAWS
@given(FISHERS, SHARD_SIZES, SHARD_SIZES, st.booleans(), st.sampled_from(["float32", "bfloat16"]))
def test_a_fisher_folder_is_read_as_written_and_its_ledger_has_no_shards(
    fisher: dict[str, Tensor], few: int, many: int, anchored: bool, dtype: str
) -> None:
    weights = {name: tensor_record(values * 2) for name, values in fisher.items()}
    anchor = {name: -values for name, values in fisher.items()} if anchored else None
    stored = getattr(torch, dtype)
    ledger = Ledger(tasks=[TASK], weights=weights)
    ledgers = []
    for shard_size in (few, many):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "fisher"
            write_fisher(
                folder, fisher, ledger, anchor=anchor, dtype=stored, max_shard_size=shard_size
            )
            ledgers.append((folder / "fisher.json").read_bytes())
            found = read_fisher(folder)
            for name, values in fisher.items():
                assert same_bytes(found.fisher[name], values.to(stored))
            assert (found.anchor is None) == (anchor is None)
            if found.anchor is not None and anchor is not None:
                assert all(same_bytes(found.anchor[n], values) for n, values in anchor.items())
    assert ledgers[0] == ledgers[1]
