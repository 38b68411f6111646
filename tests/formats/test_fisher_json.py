"""The ledger: what it holds comes back, and what breaks a rule is refused in plain words."""

import copy
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.conversion import converted
from formats.digest import TensorRecord, json_digest, set_digest, tensor_record
from formats.errors import ConsolidateError, InputError, NonFiniteError
from formats.fisher_json import (
    MAX_LEDGER_BYTES,
    BenchmarkRecord,
    Block,
    Budget,
    CurvePoint,
    Generated,
    Interpolation,
    LayerRecord,
    Ledger,
    Replayed,
    TaskRecord,
    check_task_name,
    ledger_bytes,
    needed_version,
    parse_ledger,
    read_ledger,
)

ROOT = Path(__file__).resolve().parents[2]


def record(shape: tuple[int, ...] = (2, 3), dtype: str = "F32", digit: str = "0") -> TensorRecord:
    return TensorRecord(dtype, shape, digit * 64)


def task(name: str = "a", **changes: Any) -> TaskRecord:
    fields: dict[str, Any] = {
        "name": name,
        "objective": "classification",
        "likelihood": "softmax",
        "labels": ["yes", "no"],
        "unit": "example",
        "examples": 3,
        "units": 3,
        "estimator": "mc",
        "mc_samples": 2,
        "seed": 0,
        "data": "train.jsonl",
        "parent": "c" * 64,
        "metrics": {"after": {"a": {"loss": 0.5}}},
        "layers": {"w": LayerRecord(1.5), "v": LayerRecord(0.0, 1.0)},
    }
    return TaskRecord(**(fields | changes))


def ledger(**changes: Any) -> Ledger:
    fields: dict[str, Any] = {
        "tasks": [task()],
        "unprotected": {"count": "a buffer"},
        "weights": {"w": record(), "v": record((4,)), "count": record((), "I64")},
        "fisher": {"w": record(), "v": record((4,))},
        "versions": {"torch": "2"},
    }
    return Ledger(**(fields | changes))


def second(**changes: Any) -> Ledger:
    """A ledger with everything that only version 2 has."""
    description = {"options": {"é": 1.0, "b": [1, None]}, "data": "x"}
    generated = Generated(3, 8, 1, 0.9, 0, None, None, 2, 0)
    done = {"made_from": json_digest(description), "description": description}
    curve = [CurvePoint(0, {"a": -1.5}), CurvePoint(0.5, {"a": 0.25})]
    old = Replayed("old.jsonl", "e" * 64, 0.25)
    between = unmeasured("b", interpolation=Interpolation(0.5, "plain", curve), replayed=old)
    between.penalty, between.ewc_lambda, between.budget = "ewc", 3.0, Budget(0.25, {"a": -0.5})
    between.unit, between.loss_on, between.max_length = "token", "assistant", 64
    fields: dict[str, Any] = {
        "tasks": [task(generated=generated, **done), between],
        "factors": {"w.R": record((3, 3), "BF16"), "w.G": record((2, 2), "BF16")},
        "blocks": {"w.R": Block("R", (1,), ("w",)), "w.G": Block("G", (0,), ("w",))},
        "factor_anchor": {"w": record()},
        "factor_offset": 0.5,
        **done,
    }
    return ledger(**(fields | changes))


def unmeasured(name: str, **changes: Any) -> TaskRecord:
    fields = {"examples": None, "units": None, "estimator": None, "mc_samples": None, "layers": {}}
    return task(name, **({"penalty": "none"} | fields | changes))


def content() -> dict[str, Any]:
    return json.loads(ledger_bytes(ledger()))


def parse(content: Any) -> Ledger:
    return parse_ledger(json.dumps(content).encode(), "a/fisher.json")


def test_everything_comes_back() -> None:
    full = ledger(
        tasks=[
            task(),
            task(
                "b-2_.x",
                labels=None,
                weight=1 / 3,
                data="owner/data",
                data_digest="f" * 64,
                ewc_lambda=1e-30,
                penalty="ewc",
                penalty_on="adapter",
                parent=None,
                seed=2**63 - 1,
                metrics={
                    "step 7": {},
                    "epoch 12": {"häuser": {"score": -1.5, "loss": 1.5}},
                    "before": {},
                },
            ),
        ],
        merge_rule="separate",
        penalty_offset=0.1,
        anchor={"w": record(digit="a"), "v": record((4,), digit="b")},
        heads={"a": {"w": record((7, 3), "BF16")}},
        base="d" * 64,
    )
    data = ledger_bytes(full)
    assert parse_ledger(data) == full
    assert ledger_bytes(parse_ledger(data)) == data
    assert data.endswith(b"}\n")
    assert "häuser".encode() in data
    assert [("parent" in task) for task in json.loads(data)["tasks"]] == [True, False]


def test_bytes_do_not_depend_on_how_the_ledger_was_built() -> None:
    one = ledger(gamma=1, tasks=[task(weight=2, ewc_lambda=3)])
    other = ledger(
        weights=dict(reversed(one.weights.items())),
        fisher=dict(reversed(one.fisher.items())),
        tasks=[task(weight=np.float64(2.0), ewc_lambda=3.0)],
    )
    assert ledger_bytes(one) == ledger_bytes(other)
    assert b'"weight": 2.0' in ledger_bytes(one)


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64, "sst2.en"])
def test_good_task_names(name: str) -> None:
    check_task_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "-a",
        "_a",
        "x" * 65,
        "a\n",
        "ä",
        "a b",
        "a\x00",
        "\x1b[0m",
        None,
    ],
)
def test_bad_task_names(name: Any) -> None:
    with pytest.raises(InputError, match="is not a task name") as caught:
        check_task_name(name)
    assert str(caught.value).isprintable()
    bad = content()
    bad["tasks"][0]["name"] = name
    with pytest.raises(InputError, match=r"a/fisher\.json, \$\.tasks\[0\]\.name: expected a "):
        parse(bad)


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            content = content[int(key) if isinstance(content, list) else key]
        if value is KeyError:
            del content[last]
        else:
            content[last] = value

    return change


DAMAGE = {
    "no object": (lambda content: content.clear(), "format"),
    "another format": (changed("format", "fisher"), "format"),
    "a later version": (changed("version", 3), "expected format version 1 or 2, found 3"),
    "a second version for nothing": (changed("version", 2), r"\$\.version: expected 1, found 2"),
    "a version that is a string": (changed("version", "1"), "version 1 or 2, found '1'"),
    "a version that is true": (changed("version", True), "version 1 or 2, found true"),
    "a version that is 1.0": (changed("version", 1.0), r"version 1 or 2, found 1\.0"),
    "no version": (changed("version", KeyError), "version 1 or 2, found null"),
    "an unknown field": (changed("extra", 1), "no field 'extra'"),
    "a base that is no digest": (changed("base", "d" * 63), "base: expected a SHA-256"),
    "a penalty on something else": (
        changed("tasks/0/penalty_on", "weights"),
        r"tasks\[0\]\.penalty_on: expected adapter or merged",
    ),
    "an adapter's penalty without a base": (
        changed("tasks/0/penalty_on", "adapter"),
        "'a' has an adapter's Fisher",
    ),
    "an unknown task field": (changed("tasks/0/extra", 1), r"tasks\[0\]: .*no field 'extra'"),
    "a missing field": (changed("gamma", KeyError), "'gamma' is missing"),
    "a missing task field": (changed("tasks/0/seed", KeyError), r"tasks\[0\]: .*'seed' is missing"),
    "tasks that are an object": (changed("tasks", {}), "tasks: expected a list"),
    "no tasks": (changed("tasks", []), "tasks: expected a list of length >= 1"),
    "a task that is a string": (changed("tasks", ["a"]), r"tasks\[0\]: expected an object"),
    "another rule": (changed("merge_rule", "sum"), "merge_rule: expected online or separate"),
    "a rule that is a list": (changed("merge_rule", ["online"]), "merge_rule"),
    "gamma above 1": (changed("gamma", 1.5), "gamma: expected a number <= 1.0, found 1.5"),
    "gamma true": (changed("gamma", True), "gamma: expected a number, found true"),
    "gamma a string": (changed("gamma", "1"), "gamma: expected a number"),
    "negative offset": (changed("penalty_offset", -1e-9), "penalty_offset: expected a number >= 0"),
    "another unit": (changed("tasks/0/unit", "batch"), "unit: expected example or token"),
    "no examples": (changed("tasks/0/examples", 0), "examples: expected an integer >= 1"),
    "examples 3.0": (changed("tasks/0/examples", 3.0), "examples"),
    "examples true": (changed("tasks/0/units", True), "units"),
    "a seed beyond 63 bits": (changed("tasks/0/seed", 2**63), "seed"),
    "a negative seed": (changed("tasks/0/seed", -1), "seed"),
    "another estimator": (changed("tasks/0/estimator", "ema"), "estimator: expected exact or mc"),
    "no samples": (changed("tasks/0/mc_samples", 0), "mc_samples"),
    "a negative weight": (changed("tasks/0/weight", -1.0), "weight: expected a number >= 0"),
    "an absolute path": (changed("tasks/0/data", "/home/me/train.csv"), "data: .*no path"),
    "a path upwards": (changed("tasks/0/data", "../train.csv"), "data: .*no path"),
    "a long path": (changed("tasks/0/data", "a/b/c"), "data: .*no path"),
    "a short digest": (changed("tasks/0/data_digest", "ab"), "data_digest: expected a SHA-256"),
    "a parent that is null": (
        changed("tasks/0/parent", None),
        "parent: .* no such field, found null",
    ),
    "a parent that is no digest": (changed("tasks/0/parent", "C" * 64), "parent: expected a SHA"),
    "labels that are a string": (changed("tasks/0/labels", "yes"), "labels: expected a list"),
    "a label that is a number": (changed("tasks/0/labels", ["a", 1]), r"labels\[1\]"),
    "a negative lambda": (changed("tasks/0/ewc_lambda", -2), "ewc_lambda"),
    "an empty objective": (changed("tasks/0/objective", ""), "objective: .*not empty"),
    "metrics at no known time": (
        changed("tasks/0/metrics", {"later": {}}),
        "metrics, a name: .*'later'",
    ),
    "step 0": (changed("tasks/0/metrics", {"step 0": {}}), "metrics, a name: .*'step 0'"),
    "epoch 0": (changed("tasks/0/metrics", {"epoch 0": {}}), "metrics, a name: .*'epoch 0'"),
    "a metric that is null": (
        changed("tasks/0/metrics", {"after": {"a": {"loss": None}}}),
        r"metrics\['after'\]\['a'\]\['loss'\]: expected a number, found null",
    ),
    "a negative trace": (changed("tasks/0/layers/w/trace", -1), r"layers\['w'\].trace"),
    "an overlap above 1": (changed("tasks/0/layers/w/overlap", 1.1), r"layers\['w'\].overlap"),
    "an empty reason": (changed("unprotected/count", ""), r"unprotected\['count'\]"),
    "an unprotected stranger": (changed("unprotected/x", "why"), "'x' is not among the weights"),
    "unprotected and protected": (changed("unprotected/w", "why"), "'w' has a Fisher too"),
    "neither": (changed("unprotected", {}), "'count' has neither"),
    "a shape that is a number": (changed("fisher/tensors/w/shape", 6), "shape: expected a list"),
    "a negative size": (changed("fisher/tensors/w/shape", [-2, -3]), r"shape\[0\]"),
    "an upper-case digest": (changed("fisher/tensors/w/sha256", "A" * 64), "sha256"),
    "an odd dtype": (changed("fisher/tensors/w/dtype", "f32"), "dtype"),
    "an edited record": (changed("weights/tensors/w/sha256", "1" * 64), "weights.digest: .*edited"),
    "an edited digest": (changed("fisher/digest", "1" * 64), "fisher.digest: .*edited"),
    "an anchor that is a list": (changed("anchor", []), "anchor: expected an object"),
    "a version that is a number": (changed("versions/torch", 2), r"versions\['torch'\]"),
    "a nameless tensor": (changed("versions/", "2"), "versions, a name: .*not empty"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_by_file_and_field(what: str) -> None:
    damage, message = DAMAGE[what]
    bad = content()
    damage(bad)
    with pytest.raises(InputError, match=message) as caught:
        parse(bad)
    assert str(caught.value).startswith("a/fisher.json")
    assert len(str(caught.value)) < 300


BUILT = {
    "the same task twice": ({"tasks": [task(), task("b"), task()]}, r"tasks\[2\].*'a' .*twice"),
    "gamma with separate": ({"merge_rule": "separate", "gamma": 0.5}, "gamma: expected 1.0"),
    "no Fisher": ({"fisher": {}}, "fisher: expected at least one tensor"),
    "a Fisher of a buffer": (
        {"fisher": {"w": record(), "v": record((4,)), "count": record(())}, "unprotected": {}},
        "'count': its weight is I64",
    ),
    "a Fisher of another shape": (
        {"fisher": {"w": record((3, 2)), "v": record((4,))}},
        r"'w': expected the weight's shape \[2, 3\], found \[3, 2\]",
    ),
    "a Fisher in float16": (
        {"fisher": {"w": record(dtype="F16"), "v": record((4,))}},
        "'w': expected F32 or BF16, found F16",
    ),
    "two dtypes": ({"fisher": {"w": record(dtype="BF16"), "v": record((4,))}}, "one dtype"),
    "a Fisher of a stranger": (
        {"fisher": {"w": record(), "v": record((4,)), "x": record()}},
        "'x' is not among the weights",
    ),
    "half an anchor": ({"anchor": {"w": record()}}, "'v' is in only one of fisher and anchor"),
    "an anchor in bfloat16": (
        {"anchor": {"w": record(dtype="BF16"), "v": record((4,))}},
        "anchor, the tensor 'w': expected F32",
    ),
    "a head of no task": ({"heads": {"../x": {"w": record()}}}, "'../x' is not a task"),
    "a head of integers": ({"heads": {"a": {"w": record(dtype="I64")}}}, "heads, a, .*found I64"),
    "a tensor named __metadata__": (
        {"weights": {"__metadata__": record(), "w": record(), "v": record((4,))}},
        "__metadata__",
    ),
}


@pytest.mark.parametrize("what", BUILT)
def test_what_could_not_be_read_back_is_not_written(what: str) -> None:
    changes, message = BUILT[what]
    with pytest.raises(InputError, match=message):
        ledger_bytes(ledger(**changes))


def test_version_2_comes_back_and_is_written_where_it_is_needed() -> None:
    full = second()
    data = ledger_bytes(full)
    assert parse_ledger(data) == full
    assert ledger_bytes(parse_ledger(data)) == data
    assert needed_version(full) == json.loads(data)["version"] == 2
    assert needed_version(ledger()) == json.loads(ledger_bytes(ledger()))["version"] == 1
    factors = dict.fromkeys(("factors", "blocks", "factor_anchor", "factor_offset"))
    plain: dict[str, Any] = {**factors, "description": None, "tasks": [task()]}
    for part in (
        {"tasks": [unmeasured("b")]},
        {"tasks": [task(generated=full.tasks[0].generated)]},
        {"tasks": full.tasks[:1]},
        {"tasks": [task(penalty="none", interpolation=Interpolation(0.5, "fisher", []))]},
        {"tasks": [task(penalty="none", replayed=Replayed("old", None, 0.5))]},
        {"tasks": [task(penalty="l2", ewc_lambda=1.0, budget=Budget(0.5, {"b": 0.5}))]},
        {"tasks": [task(unit="token", loss_on="completion")]},
        {"tasks": [task(max_length=1)]},
        {"description": full.description},
        {"factors": full.factors, "blocks": full.blocks},
        {name: getattr(full, name) for name in factors},
    ):
        some = second(**(plain | part))
        assert json.loads(ledger_bytes(some))["version"] == 2
        assert parse_ledger(ledger_bytes(some)) == some
    assert json.loads(ledger_bytes(second(**plain)))["version"] == 1


def test_the_digest_of_a_description_is_over_its_json_without_blanks() -> None:
    description = {"ö": [1, 2.5, None], "a": {"c": "x", "b": True}}
    text = '{"a":{"b":true,"c":"x"},"ö":[1,2.5,null]}'
    assert json_digest(description) == hashlib.sha256(text.encode()).hexdigest()


DAMAGE_2 = {
    "version 1": (changed("version", 1), "format version 1 has no field 'factors'"),
    "factors without blocks": (changed("blocks", KeyError), "the same names"),
    "blocks without factors": (changed("factors", KeyError), "the same names"),
    "no factors": (changed("factors", None), r"\$\.factors: .* no such field, found null"),
    "a block less": (changed("blocks/w.R", KeyError), "the same names"),
    "another matrix": (changed("blocks/w.R/matrix", "H"), "matrix: expected A or R or G"),
    "no dimension": (changed("blocks/w.R/dims", []), "dims: expected a list of length >= 1"),
    "dimensions in disorder": (changed("blocks/w.R/dims", [1, 0]), "dims: expected ascending"),
    "a dimension too many": (changed("blocks/w.R/dims", [2]), "a parameter with the dimensions"),
    "another dimension": (changed("blocks/w.R/dims", [0]), r"the shape \[2, 2\], found \[3, 3\]"),
    "a bias of another layer": (changed("blocks/w.G/parameters", ["w", "v"]), r"shape \[4, 4\]"),
    "a bias of other outputs": (
        changed("blocks/w.R/parameters", ["w", "v"]),
        r"a bias of the outputs, found shape \[4\]",
    ),
    "biases alone": (changed("blocks/w.R/parameters", ["v"]), "a parameter with the dimensions"),
    "a parameter without a Fisher": (changed("blocks/w.R/parameters", ["count"]), "has no Fisher"),
    "a parameter twice": (changed("blocks/w.R/parameters", ["w", "w"]), "two matrices R"),
    "an unknown block field": (changed("blocks/w.R/side", 1), "field 'side' is unknown"),
    "a negative offset": (changed("factor_offset", -1.0), "factor_offset: expected a number >= 0"),
    "no offset": (changed("factor_offset", None), "no such field, found null"),
    "a block without parameters": (changed("blocks/w.R/parameters", KeyError), "is missing"),
    "an edited description": (
        changed("description/data", "y"),
        r"\$\.description: expected made_from",
    ),
    "an edited task": (
        changed("tasks/0/description", {}),
        r"\$\.tasks\[0\]\.description: expected",
    ),
    "a description of nothing": (
        changed("made_from", KeyError),
        "expected made_from .*, found None",
    ),
    "a description that is a list": (changed("description", []), "description: expected an object"),
    "an unknown field of generation": (changed("tasks/0/generated/top_k", 1), "no field 'top_k'"),
    "a missing field of generation": (changed("tasks/0/generated/prompts", KeyError), "is missing"),
    "a missing length of generation": (
        changed("tasks/0/generated/max_length", KeyError),
        "is missing",
    ),
    "the loss on something else": (
        changed("tasks/1/loss_on", "user"),
        "assistant or completion or all",
    ),
    "the loss on no tokens": (changed("tasks/1/unit", "example"), "loss_on: .* the unit token"),
    "no loss": (changed("tasks/1/loss_on", None), "no such field, found null"),
    "texts of no length": (changed("tasks/1/max_length", 0), r"max_length: expected .* >= 1"),
    "no share": (changed("tasks/0/generated/top_p", 0), r"top_p: expected a number > 0"),
    "an unknown field of interpolation": (
        changed("tasks/1/interpolation/beta", 1),
        r"interpolation: .* has no field 'beta'",
    ),
    "an unknown field of a curve": (
        changed("tasks/1/interpolation/curve/0/x", 1),
        r"curve\[0\]: .* has no field 'x'",
    ),
    "another interpolation": (changed("tasks/1/interpolation/method", "x"), "plain or fisher"),
    "beyond the end": (
        changed("tasks/1/interpolation/alpha", 1.5),
        "alpha: expected a number <= 1",
    ),
    "interpolation without training": (
        changed("tasks/0/interpolation", {"alpha": 1.0, "method": "plain", "curve": []}),
        r"tasks\[0\]\.interpolation: the task was only measured",
    ),
    "an unknown field of replay": (
        changed("tasks/1/replayed/rows", 5),
        r"replayed: .* has no field 'rows'",
    ),
    "all rows replayed": (changed("tasks/1/replayed/share", 1.0), "share: expected a number < 1"),
    "replay of a path": (changed("tasks/1/replayed/data", "/a/b"), "base name of a file"),
    "replay without training": (
        changed("tasks/0/replayed", {"data": "a", "data_digest": None, "share": 0.5}),
        r"tasks\[0\]\.replayed: the task was only measured",
    ),
    "an unknown field of a budget": (
        changed("tasks/1/budget/rows", 5),
        r"budget: .* has no field 'rows'",
    ),
    "a budget of nothing": (changed("tasks/1/budget/nats", 0.0), "nats: expected a number > 0"),
    "a budget that nothing was lost of": (changed("tasks/1/budget/lost", {}), "lost: expected"),
    "a budget without a penalty": (
        changed("tasks/1/penalty", "none"),
        r"tasks\[1\]\.budget: expected it with a penalty",
    ),
    "generated of nothing": (changed("tasks/0/generated", None), "no such field, found null"),
    "half measured": (changed("tasks/1/examples", 3), r"\$\.tasks\[1\]: expected null for all"),
    "samples of nothing": (changed("tasks/1/mc_samples", 3), r"no mc_samples"),
    "layers of nothing": (
        changed("tasks/1/layers", {"w": {"trace": 0, "overlap": None}}),
        "no layers",
    ),
    "neither trained nor measured": (changed("tasks/1/penalty", None), "has a penalty"),
}


@pytest.mark.parametrize("what", DAMAGE_2)
def test_damage_of_version_2_is_refused_by_file_and_field(what: str) -> None:
    damage, message = DAMAGE_2[what]
    bad = copy.deepcopy(SECOND)
    damage(bad)
    with pytest.raises(InputError, match=message) as caught:
        parse(bad)
    assert str(caught.value).startswith("a/fisher.json")


@pytest.mark.parametrize(
    "field", ["factors", "blocks", "factor_anchor", "factor_offset", "description"]
)
def test_version_1_has_no_field_of_version_2(field: str) -> None:
    with pytest.raises(InputError, match=f"format version 1 has no field '{field}'"):
        parse(content() | {field: SECOND[field]})
    bad = content()
    bad["tasks"][0] |= {"generated": SECOND["tasks"][0]["generated"]}
    with pytest.raises(InputError, match=r"tasks\[0\]: format version 1 has no field 'generated'"):
        parse(bad)
    for name in ("loss_on", "max_length"):
        bad["tasks"] = [{**content()["tasks"][0], name: SECOND["tasks"][1][name]}]
        with pytest.raises(InputError, match=f"format version 1 has no field '{name}'"):
            parse(bad)
    bad["tasks"] = copy.deepcopy(SECOND["tasks"][1:])
    for name in ("loss_on", "max_length"):
        del bad["tasks"][0][name]
    with pytest.raises(
        InputError, match=r"tasks\[0\]: format version 1 has no field 'interpolation'"
    ):
        parse(bad)
    del bad["tasks"][0]["interpolation"]
    with pytest.raises(InputError, match=r"tasks\[0\]: format version 1 has no field 'replayed'"):
        parse(bad)
    del bad["tasks"][0]["replayed"]
    with pytest.raises(InputError, match=r"tasks\[0\]: format version 1 has no field 'budget'"):
        parse(bad)
    del bad["tasks"][0]["budget"]
    with pytest.raises(InputError, match=r"\$\.version: expected 2, found 1: a task was not"):
        parse(bad)


@pytest.mark.parametrize("factors", [{}, {"w.R": record((3, 3), "BF16"), "w.G": record((2, 2))}])
def test_factors_have_one_dtype(factors: dict[str, TensorRecord]) -> None:
    blocks = {name: block for name, block in (second().blocks or {}).items() if name in factors}
    with pytest.raises(InputError, match="factors: expected at least one tensor"):
        ledger_bytes(second(factors=factors, blocks=blocks))
    wide = second(factors={"R": record((3, 3), "F64")}, blocks={"R": Block("R", (1,), ("w",))})
    with pytest.raises(InputError, match=r"'R'\]: expected F32 or BF16, found F64"):
        ledger_bytes(wide)


def test_what_the_factors_penalty_is_around_belongs_to_factors() -> None:
    of_all = {"w": record(), "v": record((4,))}
    for changes, message in (
        ({"factor_anchor": of_all}, "'v' is in only one of factor_anchor and the parameters of"),
        ({"factor_anchor": {}}, "'w' is in only one of factor_anchor and the parameters of"),
        ({"factor_anchor": {"w": record(dtype="BF16")}}, "factor_anchor.*expected F32, found BF16"),
        ({"factor_anchor": {"w": record((3, 2))}}, r"factor_anchor.*expected the weight's shape"),
        ({"factors": None, "blocks": None}, r"\$\.factor_anchor: expected it only where there are"),
        (
            {"factors": None, "blocks": None, "factor_anchor": None},
            r"\$\.factor_offset: expected it only where there are factors",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ledger_bytes(second(**changes))


def test_a_convolution_and_its_bias() -> None:
    shapes = {"c": record((4, 3, 2, 2)), "v": record((4,))}
    blocks = {"A": Block("A", (1, 2, 3), ("c", "v")), "G": Block("G", (0,), ("c", "v"))}
    factors = {"A": record((13, 13)), "G": record((4, 4))}
    fields = {"weights": shapes, "fisher": shapes, "unprotected": {}, "blocks": blocks}
    whole = second(factors=factors, factor_anchor=shapes, **fields)
    assert parse_ledger(ledger_bytes(whole)) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_description_is_finite(value: float) -> None:
    description = {"a": [value]}
    with pytest.raises(NonFiniteError, match="a number in a description is not finite"):
        ledger_bytes(second(description=description))
    text = json.dumps(SECOND).replace('"data": "x"', '"data": 1e999')
    with pytest.raises(NonFiniteError, match="a number in a description is not finite"):
        parse_ledger(text.encode())


def test_a_description_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(InputError):
        ledger_bytes(second(description=deep))
    text = json.dumps(SECOND).replace('"data": "x"', '"data": ' + "[" * 900 + "]" * 900)
    with pytest.raises(InputError):
        parse_ledger(text.encode())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_written(value: float) -> None:
    bad = ledger(tasks=[task(metrics={"after": {"a": {"loss": value}}})])
    with pytest.raises(NonFiniteError, match=r"\['after'\]\['a'\]\['loss'\]: expected a finite"):
        ledger_bytes(bad)
    with pytest.raises(NonFiniteError, match="gamma"):
        ledger_bytes(ledger(gamma=value))


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_tokens_that_are_not_json_are_refused(token: str) -> None:
    text = ledger_bytes(ledger()).decode().replace('"gamma": 1.0', f'"gamma": {token}')
    with pytest.raises(InputError, match=f"x is not a ledger: {token} is not a JSON number"):
        parse_ledger(text.encode(), "x")


@pytest.mark.parametrize("token", ["1e999", "9" * 400, "9" * 5000])
def test_numbers_that_overflow_are_refused(token: str) -> None:
    text = ledger_bytes(ledger()).decode().replace('"gamma": 1.0', f'"gamma": {token}')
    with pytest.raises(ConsolidateError, match=r"^x\b") as caught:
        parse_ledger(text.encode(), "x")
    assert caught.value.exit_code in (3, 4)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a ledger"),
        (b"\xff\xfe", "not a ledger"),
        (b"\xef\xbb\xbf{}", "not a ledger"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"consolidate-fisher"', "not a ledger"),
        (b"[]", "not a ledger"),
        (b'{"format": "consolidate-fisher", "version": 1}', "'tasks' is missing"),
        (b'{"version": 1, "version": 2}', "'version' appears twice"),
    ],
)
def test_what_is_no_ledger_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_ledger(data, "x")


def test_lone_surrogates_are_refused() -> None:
    text = ledger_bytes(ledger()).decode()
    for found, put in (('"yes"', '"\\ud800"'), ('"count"', '"\\udc00"')):
        with pytest.raises(InputError, match="lone surrogate"):
            parse_ledger(text.replace(found, put).encode())
    with pytest.raises(InputError, match="lone surrogate"):
        ledger_bytes(ledger(tasks=[task(data="\udcff.csv")]))


def test_control_characters_do_not_reach_the_message() -> None:
    bad = content()
    bad["weights"]["tensors"]["\x1b[2J\n" + "x" * 10_000] = {}
    with pytest.raises(InputError) as caught:
        parse(bad)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["x", "x\n\x1b[2J", "x - at `$.foo", "x` - at `$.foo[...].y", "`"])
def test_an_unknown_field_of_a_record_is_named_whatever_it_is(name: str) -> None:
    bad = content()
    bad["weights"]["tensors"]["w"][name] = 1
    bad["fisher"][name] = 1
    with pytest.raises(InputError, match=r"the field '.*' is unknown") as caught:
        parse(bad)
    assert str(caught.value).startswith("a/fisher.json, $.weights")
    assert str(caught.value).isprintable()
    bad["weights"] = content()["weights"]
    with pytest.raises(InputError, match=r"the field '.*' is unknown") as caught:
        parse(bad)
    assert str(caught.value).startswith("a/fisher.json, $.fisher")
    assert str(caught.value).isprintable()


def test_a_ledger_larger_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "fisher.json"
    with path.open("wb") as file:
        file.truncate(MAX_LEDGER_BYTES + 2**33)
    start = time.process_time()
    with pytest.raises(InputError, match=r"fisher\.json is too large: .* 128 MiB"):
        read_ledger(path)
    assert time.process_time() - start < 5


def test_a_task_listed_twice_and_one_too_many_are_refused() -> None:
    many = content()
    many["tasks"] = [many["tasks"][0] | {"name": f"t{i}", "layers": {}} for i in range(4_095)]
    many["tasks"].append(many["tasks"][0])
    with pytest.raises(InputError, match=r"tasks\[4095\].*'t0' is listed twice"):
        parse(many)
    many["tasks"].append(many["tasks"][0])
    with pytest.raises(
        InputError, match=r"tasks: expected a list of length <= 4096, found a list of"
    ):
        parse(many)


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: expected the ledger"):
        read_ledger(tmp_path / "none.json")
    with pytest.raises(InputError, match="no regular file"):
        read_ledger(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    members = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in list(members):
        found.append((content, key))
        if isinstance(value, dict | list):
            found.extend(places(value))
    return found


@given(st.data())
def test_any_value_anywhere_is_read_or_refused_in_words(data: st.DataObject) -> None:
    bad = copy.deepcopy(data.draw(st.sampled_from([CONTENT, SECOND])))
    container, key = data.draw(
        st.sampled_from(range(len(places(bad)))).map(places(bad).__getitem__)
    )
    container[key] = data.draw(JSON)
    try:
        read = parse(bad)
    except ConsolidateError as error:
        message = str(error)
    else:
        assert parse_ledger(ledger_bytes(read)) == read
        return
    assert message.startswith("a/fisher.json")


CONTENT = content()
SECOND = json.loads(ledger_bytes(second()))


def test_the_worked_example_of_the_specification() -> None:
    page = (ROOT / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (\[.*?\]) \| (.*?) \| `([0-9a-f]+)` \|$", page, re.M
    )
    dtypes = {"F32": torch.float32, "I64": torch.int64, "BF16": torch.bfloat16}
    records = {}
    for name, dtype, shape, values, stored in rows:
        numbers = [float(value.replace("−", "-")) for value in values.split(", ")]
        tensor = torch.tensor(numbers).to(dtypes[dtype]).reshape(json.loads(shape))
        assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()).hex() == stored
        records[name] = tensor_record(tensor)
    assert len(records) == 3
    (block,) = re.findall(r"```jsonl\n(.*?)```", page, re.S)
    assert [json.loads(line) for line in block.splitlines()] == [
        [name, records[name].dtype, list(records[name].shape), records[name].sha256]
        for name in sorted(records)
    ]
    assert set_digest(records) in page


def test_the_specification_lists_the_fields_in_the_order_written() -> None:
    page = (ROOT / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
    tables = [
        re.findall(r"^\| `(\w+)` \|", table, re.M)
        for table in page[page.index("## The ledger") :].split("| field | type | meaning |")[1:]
    ]
    whole = second(base="d" * 64)
    whole.tasks[0].penalty, whole.tasks[0].penalty_on = "ewc", "adapter"
    whole.tasks[0].interpolation = whole.tasks[1].interpolation
    whole.tasks[0].replayed = whole.tasks[1].replayed
    whole.tasks[0].budget, whole.tasks[0].ewc_lambda = whole.tasks[1].budget, 3.0
    whole.tasks[0].unit, whole.tasks[0].loss_on, whole.tasks[0].max_length = "token", "all", 64
    whole.tasks[0].benchmarks = {"a": BenchmarkRecord("0.4.13", "arc", "1", "acc", 8, 8, None)}
    whole.tasks[1].weight_by = "trace"
    assert whole.tasks[0].generated is not None
    whole.tasks[0].generated.texts = "d" * 64
    written = json.loads(ledger_bytes(whole))
    first, unmeasured = written["tasks"]
    fields = [*first]
    before = [*unmeasured][[*unmeasured].index("weight_by") - 1]
    fields.insert(fields.index(before) + 1, "weight_by")
    expected = [
        written,
        written["weights"],
        written["weights"]["tensors"]["w"],
        fields,
        first["layers"]["w"],
        first["generated"],
        first["benchmarks"]["a"],
        first["interpolation"],
        first["interpolation"]["curve"][0],
        first["replayed"],
        first["budget"],
        written["blocks"]["w.R"],
    ]
    assert tables == [list(one) for one in expected]
    assert f"{MAX_LEDGER_BYTES:,} bytes" in page


EXAMINED: list[str] = []


def slowly() -> type[int]:
    EXAMINED.append("x")
    time.sleep(0.1)
    return int


@dataclass
class Slow:
    x: "slowly()"  # type: ignore[valid-type]  # msgspec evaluates it, in Python


def test_a_type_is_examined_by_one_thread_while_others_wait() -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(converted({"x": 1}, Slow, "a").x))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 4
    assert EXAMINED == ["x"]
