import pytest
import torch
from torch import nn

from consolidate.models.layout import Group, Layout, renamed_factors
from consolidate.models.tensor_names import same_names_layout
from formats.errors import InputError
from formats.fisher_json import Block


class Attention(nn.Module):
    """A module with the three projections that its file holds as one."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 3, bias=False)
        self.k = nn.Linear(2, 3, bias=False)
        self.v = nn.Linear(2, 3, bias=False)
        self.out = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(1))


FILE = {"qkv": (2, 9), "out.bias": (2,), "out.weight": (2, 3)}
PARTS = ("q.weight", "k.weight", "v.weight")


def split(tensors):
    return [part.contiguous() for part in tensors[0].T.chunk(3)]


def fused(convert=split) -> Layout:
    groups = [
        Group(("qkv",), PARTS, convert),
        Group(("out.bias",), ("out.bias",), None),
        Group(("out.weight",), ("out.weight",), None),
    ]
    return Layout(Attention(), groups, FILE, {})


def parameters() -> dict[str, torch.Tensor]:
    return {name: torch.rand(p.shape) for name, p in Attention().named_parameters()}


def test_a_transposed_and_fused_tensor_goes_round() -> None:
    layout = fused()
    values = parameters()
    stored = layout.to_file(values)
    assert list(stored) == list(FILE)  # in the file's order
    joined = torch.cat([values[name] for name in PARTS]).T
    assert torch.equal(stored["qkv"], joined)
    assert stored["qkv"].is_contiguous()
    back = layout.to_module(stored)
    assert list(back) == list(values)  # in the module's order
    for name in values:
        assert torch.equal(back[name], values[name])


def test_matrices_follow_tensors_that_are_at_most_renamed() -> None:
    groups = [
        Group(("qkv",), PARTS, split),
        Group(("dense.b",), ("out.bias",), None),
        Group(("dense.w",), ("out.weight",), None),
    ]
    shapes = {"qkv": (2, 9), "dense.b": (2,), "dense.w": (2, 3)}
    layout = Layout(Attention(), groups, shapes, {})
    blocks = {
        "q.weight.R": Block("R", (1,), ("q.weight",)),
        "out.weight.R": Block("R", (1,), ("out.weight", "out.bias")),
    }
    factors = {"q.weight.R": torch.eye(2), "out.weight.R": torch.eye(4)}
    matrices, named = renamed_factors(factors, blocks, layout.stored_alone())
    assert named == {"dense.w.R": Block("R", (1,), ("dense.w", "dense.b"))}
    assert matrices["dense.w.R"] is factors["out.weight.R"]
    back, again = renamed_factors(matrices, named, layout.loaded_alone())
    assert again == {"out.weight.R": blocks["out.weight.R"]}
    assert list(back) == ["out.weight.R"]
    converted = {"qkv.R": Block("R", (1,), ("qkv",))}
    alone = layout.loaded_alone()
    assert renamed_factors({"qkv.R": torch.eye(9)}, converted, alone) == ({}, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_any_dtype_goes_round(dtype: torch.dtype) -> None:
    values = {name: ((t - 0.5) * 10).clamp(min=0).to(dtype) for name, t in parameters().items()}
    back = fused().to_module(fused().to_file(values))
    assert all(torch.equal(back[n], values[n]) and back[n].dtype == dtype for n in values)


def test_a_part_of_a_fused_tensor_is_filled_up() -> None:
    layout = fused()
    values = parameters()
    stored = layout.to_file({"k.weight": values["k.weight"]})
    assert list(stored) == ["qkv"]
    back = layout.to_module(stored)
    assert torch.equal(back["k.weight"], values["k.weight"])
    assert not back["q.weight"].any()
    assert not back["v.weight"].any()


def test_names_of_both_sides() -> None:
    layout = fused()
    assert layout.file_names("k.weight") == ["qkv"]
    assert layout.module_names("qkv") == list(PARTS)
    assert layout.file_names("scale") == []
    assert layout.canonical("nothing") is None


def test_a_buffer_that_the_file_lacks_stays_out_of_files() -> None:
    assert "scale" not in fused().to_file(dict(Attention().state_dict()))


def test_a_parameter_that_the_file_lacks_keeps_its_name() -> None:
    layout = Layout(Attention(), [Group(("qkv",), PARTS, split)], {"qkv": (2, 9)}, {})
    assert layout.fresh == ("out.weight", "out.bias")
    values = parameters()
    stored = layout.to_file(values)
    assert list(stored) == ["qkv", "out.weight", "out.bias"]
    assert torch.equal(layout.to_module(stored)["out.bias"], values["out.bias"])


def doubled(tensors):
    return [part + part for part in split(tensors)]


def first_thrice(tensors):
    return [split(tensors)[0]] * 3


def as_fractions(tensors):
    return [part / 1 for part in split(tensors)]


def lookup(tensors):
    return [tensors[0].new_zeros(3, 2) for _ in PARTS]


@pytest.mark.parametrize("convert", [doubled, first_thrice, as_fractions, lookup])
def test_what_is_not_a_rearrangement_is_refused(convert) -> None:
    with pytest.raises(InputError, match=r"qkv cannot be used: expected a permutation"):
        fused(convert)


def test_a_conversion_to_another_shape_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"q\.weight, converted from qkv, does not match: .*found \[2, 3\]"
    ):
        fused(lambda tensors: [part.T.contiguous() for part in split(tensors)])


def test_wrong_names_and_shapes_are_refused() -> None:
    layout = fused()
    with pytest.raises(InputError, match=r"q\.wight is not a parameter"):
        layout.to_file({"q.wight": torch.ones(3, 2)})
    with pytest.raises(
        InputError, match=r"q\.weight does not match: .* as in the model, found \[2, 3\]"
    ):
        layout.to_file({"q.weight": torch.ones(2, 3)})
    with pytest.raises(InputError, match="other is not a tensor of the model's weights file"):
        layout.to_module({"other": torch.ones(1)})
    with pytest.raises(
        InputError, match=r"qkv does not match: .* as in the weights file, found \[9, 2\]"
    ):
        layout.to_module({"qkv": torch.ones(9, 2)})


def test_shapes_of_module_and_file_must_agree() -> None:
    shapes = {name: tuple(t.shape) for name, t in Attention().state_dict().items()}
    assert same_names_layout(Attention(), shapes).unused == {}
    shapes["out.weight"] = (3, 2)
    with pytest.raises(
        InputError,
        match=r"out\.weight does not match: expected \[2, 3\] as in the model, found \[3, 2\]",
    ):
        same_names_layout(Attention(), shapes)


def test_all_names_of_a_tied_tensor_are_understood() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    layout = same_names_layout(module, {"b.weight": (2, 2)})
    value = torch.rand(2, 2)
    for name in ("a.weight", "b.weight"):
        assert torch.equal(layout.to_file({name: value})["b.weight"], value)
    assert list(layout.to_module({"b.weight": value})) == ["a.weight"]
    both = same_names_layout(module, {"b.weight": (2, 2), "a.weight": (2, 2)})
    assert both.duplicates == {"b.weight": "a.weight"}
    assert list(both.to_file({"b.weight": value})) == ["a.weight"]
    assert list(both.to_module({"a.weight": value})) == ["a.weight"]
    # What is given by a second name alone is the tensor too.
    assert torch.equal(both.to_module({"b.weight": value})["a.weight"], value)


def test_every_other_name_of_a_tied_tensor_leads_to_the_one_that_counts() -> None:
    module = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    module["b"].weight = module["c"].weight = module["a"].weight
    layout = same_names_layout(module, dict.fromkeys(("c.weight", "b.weight", "a.weight"), (2, 2)))
    assert layout.duplicates == {"c.weight": "a.weight", "b.weight": "a.weight"}
    for name in ("a.weight", "b.weight", "c.weight"):
        assert layout.module_names(name) == ["a.weight"]
