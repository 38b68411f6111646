from dataclasses import replace

import pytest
import torch

from formats.digest import TensorRecord, tensor_record
from formats.fisher_json import SAME_AS, LayerRecord, Ledger, TaskRecord
from formats.renaming import renamed, renaming

ONES, ZEROS = tensor_record(torch.ones(4)), tensor_record(torch.zeros(4))


def record(number: int) -> TensorRecord:
    return tensor_record(torch.full((4,), float(number)))


def task(*names: str) -> TaskRecord:
    return TaskRecord(
        name="t", objective="classification", likelihood="softmax", labels=None, unit="example",
        examples=1, units=1, estimator="exact", mc_samples=None, seed=0,
        layers={name: LayerRecord(1.0) for name in names},
    )  # fmt: skip


def ledger(weights: dict[str, TensorRecord], *unprotected: str, **reasons: str) -> Ledger:
    without = dict.fromkeys(unprotected, "frozen") | reasons
    fisher = {name: record for name, record in weights.items() if name not in without}
    return Ledger([task(*fisher)], unprotected=without, weights=weights, fisher=fisher)


def test_tensors_of_their_own_are_paired_by_bytes_whatever_their_names() -> None:
    fit = renaming(ledger({"a.w": record(1), "b.w": record(2)}), {"x": record(2), "y.z": record(1)})
    assert fit.names == {"a.w": "y.z", "b.w": "x"}
    assert fit.is_pure
    assert [fit.missing, fit.left_out, fit.extra, fit.unclear] == [[], [], [], []]
    assert fit.examples() == "'a.w' is now 'y.z', 'b.w' is now 'x'"


def test_alike_tensors_follow_the_longest_common_suffix() -> None:
    # Every name ends in norm.weight, and the last norm has nothing before it.
    old = ["norm.weight", "layers.0.norm.weight", "layers.1.norm.weight"]
    fit = renaming(ledger(dict.fromkeys(old, ONES)), {f"model.{name}": ONES for name in old[::-1]})
    assert fit.names == {name: f"model.{name}" for name in old}
    back = renaming(ledger({f"model.{name}": ONES for name in old}), dict.fromkeys(old, ONES))
    assert back.names == {f"model.{name}": name for name in old}


def test_alike_tensors_follow_the_other_tensors_of_their_module() -> None:
    # A layer in front renumbers all: the same name is another layer's.
    old = {f"{i}.{part}": record(i) if part == "weight" else ZEROS for i in (0, 2, 4)
           for part in ("weight", "bias")}  # fmt: skip
    new = {
        f"{i + 2}.{part}": record(i) if part == "weight" else ZEROS
        for i in (0, 2, 4)
        for part in ("bias", "weight")
    }
    expected = {name: f"{int(name[0]) + 2}{name[1:]}" for name in old}
    assert renaming(ledger(old), new).names == expected
    # A module in between, as the only thing that differs.
    old = {f"layers.{i}.{n}": r for i in (3, 4) for n, r in (("w", record(i)), ("norm.w", ONES))}
    new = {name.replace("layers.", "net.layers.block."): record for name, record in old.items()}
    fit = renaming(ledger(old), new)
    assert fit.names == {n: n.replace("layers.", "net.layers.block.") for n in old}


def test_alike_tensors_with_unrelated_names_stay_unclear() -> None:
    old = {"first.w": ONES, "second.w": ONES, "c": record(3)}
    fit = renaming(ledger(old), {"x": ONES, "y": ONES, "z": record(3)})
    assert fit.names == {"c": "z"}
    assert fit.unclear == [(["first.w", "second.w"], ["x", "y"])]
    # One of them, where two are as good.
    fit = renaming(ledger({"first.w": ONES}), {"x.w": ONES, "y.w": ONES})
    assert fit.unclear == [(["first.w"], ["x.w", "y.w"])]
    # The one that is left over is no guess.
    fit = renaming(ledger({"a.first.w": ONES, "b": ONES}), {"x.first.w": ONES, "y": ONES})
    assert fit.names == {"a.first.w": "x.first.w", "b": "y"}


def test_other_values_are_no_renaming() -> None:
    old = {"a.w": record(1), "b.w": record(2), "c.w": record(3), "d.w": record(5)}
    new = {"m.a.w": record(1), "m.b.w": record(4), "m.c.w": record(3), "m.d.w": record(5)}
    fit = renaming(ledger(old), new)
    assert (fit.is_pure, fit.is_impure, fit.missing) == (False, True, [])
    assert fit.changed == {"b.w": "m.b.w"}
    assert "other values of 'b.w' (now 'm.b.w')" in fit.faults()
    # A tensor without a Fisher was trained: these are other weights all the same.
    assert renaming(ledger(old, "b.w"), new).changed == {"b.w": "m.b.w"}
    # Only its shape or dtype is another one.
    other = {**new, "m.b.w": tensor_record(torch.full((4,), 2.0).bfloat16())}
    fit = renaming(ledger(old), other)
    assert (fit.missing, fit.changed, fit.extra) == (["b.w"], {}, ["m.b.w"])
    assert "no tensor with the dtype, shape and bytes of b.w" in fit.faults()


def test_what_only_one_has_is_reported() -> None:
    old = {"a": record(1), "ids": record(2), "b": record(3)}
    fit = renaming(ledger(old, "ids"), {"m.a": record(1), "m.b": record(3), "m.new": record(4)})
    assert fit.is_pure
    assert (fit.left_out, fit.extra) == (["ids"], ["m.new"])
    without_a = renaming(ledger(old, "ids"), {"m.b": record(3)})
    assert (without_a.is_pure, without_a.missing, without_a.left_out) == (False, ["a"], ["ids"])


@pytest.mark.parametrize("stored", ["both", "first", "second"])
def test_a_tied_tensor_has_its_fisher_under_the_name_that_is_left(stored: str) -> None:
    old = ledger(
        {"embed.weight": record(1), "head.weight": record(1)},
        **{"head.weight": SAME_AS + "embed.weight"},
    )
    new = {"m.embed.weight": record(1), "m.head.weight": record(1)}
    if stored != "both":
        del new["m.head.weight" if stored == "first" else "m.embed.weight"]
    fit = renaming(old, new)
    assert fit.is_pure
    assert fit.names["embed.weight"] == (
        "m.head.weight" if stored == "second" else "m.embed.weight"
    )
    assert fit.left_out == ([] if stored == "both" else ["head.weight"])


def test_a_saved_head_needs_its_place_in_the_weights() -> None:
    old = ledger({"body": record(1), "head": record(2)}, "head")
    old = replace(old, heads={"t": {"head": record(7)}})
    fit = renaming(old, {"m.body": record(1)})
    assert fit.missing == ["head"]


def test_a_ledger_gets_the_new_names_everywhere() -> None:
    old = ledger({"a": record(1), "b": record(2), "c": record(1)}, b="frozen", c=SAME_AS + "a")
    old = replace(old, heads={"t": {"b": record(3)}}, anchor={"a": record(4)})
    new = renamed(old, {"a": "x.a", "b": "x.b", "c": "x.c"})
    assert new.weights == {"x.a": record(1), "x.b": record(2), "x.c": record(1)}
    assert new.unprotected == {"x.b": "frozen", "x.c": SAME_AS + "x.a"}
    assert (list(new.fisher), list(new.tasks[0].layers)) == (["x.a"], ["x.a"])
    assert new.heads == {"t": {"x.b": record(3)}}
    assert new.anchor == {"x.a": record(4)}
