"""What a card says, what it keeps of a person's, and that a ledger cannot write into it."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from consolidate.views.card import SOURCE, model_card
from consolidate.views.card_text import Subject
from formats.digest import TensorRecord
from formats.errors import InputError
from formats.fisher_json import Block, Ledger, TaskRecord

SUBJECT = Subject(
    "user/model", {"model_type": "bert", "architectures": ["BertModel"]}, endpoint="hub:"
)


def task(name: str, **fields: Any) -> TaskRecord:
    metrics = fields.pop("metrics", {})
    return TaskRecord(
        name=name,
        objective="sequence-classification",
        likelihood="softmax",
        labels=["good", "bad"],
        unit="example",
        examples=60,
        units=60,
        estimator="mc",
        mc_samples=2,
        seed=3,
        data=f"{name}.jsonl",
        metrics=metrics,
        **fields,
    )


@pytest.fixture
def ledger() -> Ledger:
    record = TensorRecord("F32", (2, 3), "0" * 64)
    first = {"before": {"old": {"accuracy": 0.5}}, "after": {"old": {"accuracy": 0.9}}}
    second = {"after": {"old": {"accuracy": 0.8}, "new": {"accuracy": 0.7, "loss": 1.0}}}
    return Ledger(
        tasks=[
            task("old", metrics=first),
            task("new", metrics=second, ewc_lambda=30.0, penalty="ewc", data_digest="a" * 64),
        ],
        weights={"w": record, "b": record},
        fisher={"w": record},
        unprotected={"b": "frozen"},
    )


def with_factors(ledger: Ledger) -> Ledger:
    factors = {"w.R": TensorRecord("BF16", (3, 3), "1" * 64)}
    return replace(ledger, factors=factors, blocks={"w.R": Block("R", (1,), ("w",))})


def test_factors_are_described_with_what_they_reveal(ledger: Ledger) -> None:
    plain, card = (model_card(None, each, SUBJECT) for each in (ledger, with_factors(ledger)))
    said = "1 matrix in BF16 (18 bytes), for 6 of these values"
    for words in (
        said,
        "`--structure diagonal`",
        "The factors (1 matrix) reveal more than the diagonal",
    ):
        assert words in card
        assert words not in plain
    assert "with a diagonal Fisher: it ignores how weights act together, becomes" in plain
    assert "with a Fisher that is diagonal or, in a covered layer, the same matrix" in card


def test_tasks_of_merged_models_are_in_no_order(ledger: Ledger) -> None:
    assert "### Tasks, in training order\n" in model_card(None, ledger, SUBJECT)
    parents = [replace(each, penalty="ewc", parent="b" * 64) for each in ledger.tasks]
    separate, two = replace(ledger, merge_rule="separate"), ("them/one", "them/two")
    of_others = model_card(None, ledger, replace(SUBJECT, base_model=two))
    assert "### Tasks, in training order\n" in of_others
    for merged, subject in (
        (separate, replace(SUBJECT, relation="merge")),
        (separate, replace(SUBJECT, base_model=two)),
        (replace(ledger, tasks=parents), SUBJECT),
    ):
        card = model_card(None, merged, subject)
        assert "### Tasks of the merged models\n" in card
        assert "training order" not in card


def metadata(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_a_new_card_says_what_the_ledger_says(ledger: Ledger) -> None:
    card = model_card(None, ledger, replace(SUBJECT, base_model=("them/base",)))
    data = metadata(card)
    assert data["tags"] == ["consolidate", "ewc"]
    assert (data["library_name"], data["base_model"]) == ("transformers", "them/base")
    assert data["base_model_relation"] == "finetune"
    results = data["model-index"][0]["results"]
    assert [
        (result["dataset"]["name"], metric["value"], metric.get("args"))
        for result in results
        for metric in result["metrics"]
    ] == [("old", 0.8, None), ("old", 0.9, {"after_training": "old"}), ("new", 0.7, None)]
    for line in (
        "| 2 | new | sequence-classification | good, bad | new.jsonl | ewc, λ = 30 |",
        "| old | 0.9000 | – |",
        "| new | 0.8000 | 0.7000 |",
        "ACC 0.7500, BWT -0.1000, forgetting 0.1000",
        "| old | mc × 2 | 60 examples | 3 | 1 |",
        "6 values in F32",
        "1 tensors are not protected: frozen.",
        "consolidate finetune user/model --data mine.jsonl",
        "a digest of the data of new, which",
    ):
        assert line in card


def test_what_a_person_wrote_is_kept(ledger: Ledger) -> None:
    theirs = (
        "---\nlicense: mit\nlibrary_name: flair\ntags: [mine, ewc]\nmodel-index:\n- name: model\n"
        "  results:\n  - task: {type: x}\n    dataset: {type: d, name: D}\n"
        "    metrics: [{type: f1, value: 1}]\n---\n# My model\n\nAll of it is mine: é ---\n"
    )
    card = model_card(theirs, ledger, SUBJECT)
    data = metadata(card)
    assert data["license"] == "mit"
    assert data["library_name"] == "flair"
    assert data["tags"] == ["mine", "ewc", "consolidate"]
    assert [model["name"] for model in data["model-index"]] == ["model"]
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "f1", "value": 1}]
    assert "# My model\n\nAll of it is mine: é ---\n\n<!-- consolidate:begin" in card

    again = card.replace("<!-- consolidate:end -->\n", "<!-- consolidate:end -->\n\nAnd after.\n")
    shorter = replace(ledger, tasks=ledger.tasks[:1])
    second = model_card(again, shorter, SUBJECT)
    assert second.endswith("<!-- consolidate:end -->\n\nAnd after.\n")
    assert "| 2 | new |" not in second
    sources = [
        r.get("source", {}).get("name") for r in metadata(second)["model-index"][0]["results"]
    ]
    assert sources == [None, SOURCE]
    assert model_card(second, shorter, SUBJECT) == second


def test_fields_and_lines_stay_as_a_person_left_them(ledger: Ledger) -> None:
    theirs = (
        "---\nzeta: 1\nmodel-index:\n- name: theirs\n  results:\n  - metrics: [{own: 2}]\n"
        "    source: {name: else}\nlicense:\nlanguage: no\n---\n# Mine\n\nText.  \n"
    )
    card = model_card(theirs, ledger, SUBJECT)
    data = metadata(card)
    kept = ["zeta", "model-index", "license", "language", "tags", "library_name"]
    assert list(data) == kept
    assert card.startswith("---\nzeta: 1\nmodel-index:\n- name: theirs\n")
    assert "\nlicense:\nlanguage: no\ntags:\n- consolidate\n- ewc\n" in card
    assert (data["license"], data["language"]) == (None, False)
    assert data["model-index"][0] == yaml.safe_load(theirs.split("---\n")[1])["model-index"][0]
    windows = model_card(theirs.replace("\n", "\r\n"), ledger, SUBJECT)
    assert windows == card.replace("\n", "\r\n")
    assert model_card(windows, ledger, SUBJECT) == windows
    assert model_card("\ufeff" + theirs, ledger, SUBJECT) == card


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ("# why\nversion: 1.10  # not 1.1\n\n# mine\ntags: [a, ewc]\nx: {y: no}\n# end", True),
        ("note: |\n  # not a comment\n\n  text\nlanguage:\n- no\n# between\n- en", True),
        ("a: &x [1]\nb: *x", False),  # fields that do not stand alone
        ("{a: 1, b: no}", False),
    ],
)
def test_metadata_that_nobody_changed_keep_their_text(
    ledger: Ledger, fields: str, kept: bool
) -> None:
    card = model_card(f"---\n{fields}\n---\n# Mine\n", ledger, SUBJECT)
    theirs, data = yaml.safe_load(fields), metadata(card)
    assert {key: data[key] for key in theirs if key != "tags"} == {
        key: value for key, value in theirs.items() if key != "tags"
    }
    for line in fields.splitlines():
        assert not kept or line in card or line.startswith("tags:")
    assert model_card(card, ledger, SUBJECT) == card


def test_tasks_of_one_dataset_keep_their_scores_apart(ledger: Ledger) -> None:
    tasks = [replace(task, data="them/glue") for task in ledger.tasks]
    data = metadata(model_card(None, replace(ledger, tasks=tasks), SUBJECT))
    found = {
        (result["dataset"]["name"], metric["value"])
        for result in data["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert found == {("old", 0.8), ("old", 0.9), ("new", 0.7)}


def test_the_card_of_another_repository_names_the_base(ledger: Ledger) -> None:
    theirs = model_card("---\nlicense: mit\nbase_model: far/away\n---\n", ledger, SUBJECT)
    mine = model_card(theirs, ledger, replace(SUBJECT, repository="me/mine"))
    assert metadata(mine)["base_model"] == "user/model"
    assert metadata(mine)["license"] == "mit"
    assert "made from [user/model](hub:/user/model) for" in mine
    assert "consolidate finetune me/mine --data" in mine


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("far/away", "made from [far/away](hub:/far/away) for"),
        ("[far/away]", "made from [far/away](hub:/far/away) for"),
        ("[a/b, c/d]\nbase_model_relation: merge", "Tasks of the merged models"),
        ("[a/b, c/d]\nbase_model_relation: finetune", "Tasks, in training order"),
        ("[a/b, not a name]", "Tasks, in training order"),
    ],
)
def test_a_second_card_is_the_first(ledger: Ledger, theirs: str, said: str) -> None:
    existing = f"---\nbase_model: {theirs}\n---\n# Mine\n"
    ledger = replace(ledger, merge_rule="separate")
    once = model_card(existing, ledger, SUBJECT)
    assert said in once
    assert metadata(once)["base_model"] == metadata(existing)["base_model"]
    assert model_card(once, ledger, SUBJECT) == once


def test_a_merge_has_several_bases(ledger: Ledger) -> None:
    data = metadata(model_card(None, ledger, replace(SUBJECT, base_model=("a/b", "c/d"))))
    assert (data["base_model"], data["base_model_relation"]) == (["a/b", "c/d"], "merge")


def test_a_fisher_alone_names_its_weights(ledger: Ledger) -> None:
    subject = Subject(
        "me/fisher", base_model=("them/base",), base_commit="c" * 40, fisher_only=True
    )
    card = model_card(None, ledger, subject)
    data = metadata(card)
    assert (data["library_name"], data["base_model"]) == ("consolidate", "them/base")
    assert "model-index" not in data
    pinned = f"consolidate finetune them/base --revision {'c' * 40} --fisher me/fisher --data"
    assert pinned in card
    assert f'\n    revision="{"c" * 40}",\n    fisher="me/fisher", ewc_lambda=' in card
    assert f"at commit `{'c' * 40}`" in card


HOSTILE = "<script>alert(1)</script> | `x` [a](b:c)\n# h \x1b[31m &lt; <!-- consolidate:end -->"


def test_names_cannot_write_into_the_card(ledger: Ledger) -> None:
    ledger.tasks[0].labels = [HOSTILE, "---"]
    ledger.tasks[0].data = HOSTILE.replace("/", "")
    ledger.tasks[0].objective = HOSTILE
    ledger.unprotected["b"] = HOSTILE
    subject = replace(SUBJECT, config={**SUBJECT.config, "architectures": [HOSTILE]})
    card = model_card(None, ledger, subject)
    assert "<script" not in card
    assert "\x1b" not in card
    assert card.count("consolidate:end -->") == 1
    assert "\n# h" not in card
    assert model_card(card, ledger, subject) == card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7, 4, 6}


@pytest.mark.parametrize(
    ("existing", "message"),
    [
        ("---\n[1, 2]\n---\n", "names mapped to values"),
        ("---\na: [\n---\n", "expected metadata in YAML"),
        ("---\nto_yaml: 1\n---\n", "not callable"),
        ("---\nmodel-index: 3\n---\n", "expected a list of models"),
        (
            "---\nmodel-index: [{name: h, results: 5}]\n---\n",
            "expected a list as results in model-index",
        ),
        ("<!-- consolidate:begin -->\n", "once each or not at all"),
        ("<!-- consolidate:begin --><!-- consolidate:end -->" * 2, "once each or not at all"),
    ],
)
def test_a_card_that_cannot_be_kept_is_refused(ledger: Ledger, existing: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_card(existing, ledger, SUBJECT)
