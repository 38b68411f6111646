import hashlib
import struct

import pytest
import torch

from formats.digest import DTYPES, TensorRecord, differences, dtype_name, set_digest, tensor_record
from formats.errors import InputError


def test_record_is_sha256_of_little_endian_bytes():
    record = tensor_record(torch.tensor([[1.0, -2.5], [0.0, 3.25]]))
    expected = hashlib.sha256(struct.pack("<4f", 1.0, -2.5, 0.0, 3.25)).hexdigest()
    assert record == TensorRecord("F32", (2, 2), expected)


def test_integers_are_little_endian():
    expected = hashlib.sha256(struct.pack("<2q", 1, -2)).hexdigest()
    assert tensor_record(torch.tensor([1, -2])).sha256 == expected


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_digested(name):
    dtype = DTYPES[name]
    bits = torch.arange(16 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = bits.view(dtype)
    record = tensor_record(tensor)
    assert record == TensorRecord(name, (16,), hashlib.sha256(bytes(bits.tolist())).hexdigest())


def test_strides_do_not_matter():
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    for view in (tensor.transpose(0, 2), tensor[:, ::2, 1:], tensor[1].expand(5, 3, 4)):
        assert not view.is_contiguous()
        assert tensor_record(view) == tensor_record(view.contiguous())


def test_lazily_conjugated_tensor_is_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert tensor_record(tensor.conj()) == tensor_record(tensor.conj().resolve_conj())
    assert tensor_record(tensor.conj()) != tensor_record(tensor)


def test_scalar_and_empty():
    assert tensor_record(torch.tensor(1.0)).shape == ()
    empty = tensor_record(torch.ones(0, 3))
    assert empty.shape == (0, 3)
    assert empty.sha256 == hashlib.sha256(b"").hexdigest()


def test_parameter_that_needs_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert tensor_record(parameter) == tensor_record(torch.ones(3))


def test_more_than_one_chunk():
    tensor = torch.arange(70 << 20, dtype=torch.int32).to(torch.uint8)
    assert tensor_record(tensor).sha256 == hashlib.sha256(tensor.numpy()).hexdigest()


def test_dtype_without_a_name_is_refused():
    with pytest.raises(InputError, match="complex128"):
        dtype_name(torch.complex128)
    with pytest.raises(InputError, match="complex128"):
        tensor_record(torch.ones(1, dtype=torch.complex128))


def test_set_digest_is_sha256_of_sorted_json_lines():
    records = {"β": TensorRecord("F32", (2, 3), "ab"), 'a"': TensorRecord("BF16", (), "cd")}
    lines = '["a\\"","BF16",[],"cd"]\n["β","F32",[2,3],"ab"]\n'
    assert set_digest(records) == hashlib.sha256(lines.encode()).hexdigest()


def test_set_digest_ignores_order_and_nothing_else():
    first, second = TensorRecord("F32", (2,), "00"), TensorRecord("F32", (2,), "11")
    digest = set_digest({"a": first, "b": second})
    assert set_digest({"b": second, "a": first}) == digest
    others = [
        {"a": second, "b": first},
        {"a": first},
        {"a": first, "c": second},
        {"a": first, "b": TensorRecord("F32", (2, 1), "11")},
        {"a": first, "b": TensorRecord("I32", (2,), "11")},
    ]
    assert digest not in map(set_digest, others)


def test_differences_of_equal_sets():
    records = {"a": TensorRecord("F32", (2,), "00")}
    assert differences(records, dict(records)) == []


def test_differences_say_what_differs():
    expected = {name: TensorRecord("F32", (2,), name * 2) for name in "abcdef"}
    found = {
        "z": TensorRecord("F32", (2,), "zz"),
        "b": TensorRecord("F32", (2,), "00"),
        "c": TensorRecord("BF16", (2,), "cc"),
        "d": TensorRecord("F32", (1, 2), "dd"),
        "a": expected["a"],
        "new": expected["f"],
    }
    assert differences(expected, found) == [
        "'b' has the expected dtype and shape, but other values",
        "'c' has dtype BF16, expected F32",
        "'d' has shape [1, 2], expected [2]",
        "'e' is missing",
        "'f' is stored as 'new', with the same bytes",
        "'z' was not expected",
    ]


def test_differences_pair_equal_tensors_once():
    zeros = TensorRecord("F32", (2,), "00")
    assert differences({"a": zeros, "b": zeros}, {"c": zeros}) == [
        "'a' is stored as 'c', with the same bytes",
        "'b' is missing",
    ]
