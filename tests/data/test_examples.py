import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import consolidate
from consolidate.commands.measurement import default_estimator
from consolidate.data.encoding import encode, unread_columns
from consolidate.data.examples import Examples, Part, hold_out, subset
from consolidate.data.labels import Labels, label_names, label_values
from consolidate.data.replay import WithReplay
from consolidate.estimation.batches import model_outputs
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.models.objectives import get_objective
from consolidate.options import Columns, Encoding
from consolidate.training.loop import APART
from formats.checkpoint import open_checkpoint
from formats.data import Rows, open_data
from formats.errors import InputError, UsageError
from support.tiny_models import (
    SIZES,
    bert_config,
    byte_tokenizer,
    gpt2_config,
    save,
    word_tokenizer,
)

TOPICS = {0: "comp", 1: "rec", 2: "sci"}
LABELS = {"id2label": TOPICS, "label2id": {name: i for i, name in TOPICS.items()}}


def jsonl(folder: Path, *rows: dict[str, Any], name: str = "train.jsonl") -> Rows:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_data(path)


def test_numbers_beside_names_of_a_new_head_are_refused(tmp_path: Path) -> None:
    """Class 1 is not the label "1" where other labels are names."""
    labels = [{"label": label} for label in ("n/a", 1, 2)]
    with pytest.raises(InputError, match=r"row 2 .*'label': expected text, .* number 1: write"):
        label_names(jsonl(tmp_path, *labels), "classification")
    texts = [{"label": str(row["label"])} for row in labels]
    assert label_names(jsonl(tmp_path, *texts), "classification") == ["1", "2", "n/a"]


def csv(folder: Path, text: str) -> Rows:
    (folder / "train.csv").write_text(text)
    return open_data(folder / "train.csv")


def bert(folder: Path, head: str = "SequenceClassification", **options: Any) -> Model:
    cls = getattr(transformers, f"BertFor{head}")
    save(folder / "model", cls, bert_config(**options), word_tokenizer())
    return load_model(open_checkpoint(folder / "model"))


def gpt2(folder: Path, cls: Any = transformers.GPT2LMHeadModel, **options: Any) -> Model:
    save(folder / "model", cls, gpt2_config(**options), byte_tokenizer())
    return load_model(open_checkpoint(folder / "model"))


def first_batch(examples: Any, size: int = 100, **options: Any) -> tuple[Any, torch.Tensor]:
    return next(iter(examples.batches(size, **options)))


def test_replayed_rows_make_the_batch_of_one_file(tmp_path: Path) -> None:
    model = bert(tmp_path, **LABELS)
    rows = [{"text": "cat " * n, "label": n % 3} for n in (3, 1, 7, 2, 5)]
    new, old = (
        jsonl(tmp_path, *rows[:2], name="new.jsonl"),
        jsonl(tmp_path, *rows[2:], name="old.jsonl"),
    )
    both = encode(jsonl(tmp_path, *rows), model)
    mixed = WithReplay(encode(new, model), encode(old, model), seed=3)
    rounds = [subset(3, None, (3 + n * APART) % 2**63, shuffled=True) for n in (1, 2)]
    # Two rows of the first round, new ones, and the rest: its last row and two of the next round.
    for places in ([~0, 1, ~1, 0], [~2, ~3, ~4, 1], [~1, ~3], [1, 0]):
        inputs, labels = mixed.collate(places)
        old_rows = [2 + rounds[~p // 3][~p % 3] for p in places if p < 0]
        expected, numbers = both.collate([*(p for p in places if p >= 0), *old_rows])
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert torch.equal(labels, numbers)


# --- classification ----------------------------------------------------------------------------


def test_texts_are_padded_and_labels_found_by_name(tmp_path: Path) -> None:
    model = bert(tmp_path, **LABELS)
    rows = jsonl(
        tmp_path,
        {"text": "the cat sat", "label": "sci"},
        {"text": "rain", "label": 0},
        {"text": "what a lovely day it is", "label": "REC"},
    )
    examples = encode(rows, model)
    assert len(examples) == 3
    assert examples.notes == []
    inputs, labels = first_batch(examples)
    assert labels.tolist() == [2, 0, 1]
    expected = model.processor([row["text"] for row in rows], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert inputs["token_type_ids"].shape == inputs["input_ids"].shape


def test_batches_follow_the_order(tmp_path: Path) -> None:
    rows = jsonl(tmp_path, *({"text": "cat " * i, "label": i % 3} for i in range(1, 8)))
    examples = encode(rows, bert(tmp_path, **LABELS))
    batches = list(examples.batches(3, order=[6, 0, 2, 4, 5]))
    assert [len(labels) for _, labels in batches] == [3, 2]
    assert batches[0][1].tolist() == [1, 1, 0]
    # Padded to the longest of the batch, not of the data.
    assert [inputs["input_ids"].shape[1] for inputs, _ in batches] == [9, 8]
    assert [len(labels) for _, labels in examples.batches(3)] == [3, 3, 1]


def test_a_name_wins_over_a_number_written_as_text(tmp_path: Path) -> None:
    model = bert(tmp_path, id2label={0: "2", 1: "0", 2: "1"}, label2id={"2": 0, "0": 1, "1": 2})
    examples = encode(csv(tmp_path, "text,label\na cat,2\na dog,0\n"), model)
    assert first_batch(examples)[1].tolist() == [0, 1]
    plain = bert(tmp_path / "plain", num_labels=3)
    assert plain.labels is None
    examples = encode(csv(tmp_path, "text,label\na cat,2\na dog,0\n"), plain)
    assert first_batch(examples)[1].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "expected one of the model's 3 labels, comp, rec, sci .*, found 3"),
        (-1, "found -1"),
        ("talk", "found 'talk'"),
        (1.5, "found 1.5"),
        (None, "the label is missing"),
        ("", "the label is missing"),
        ([1], r"found \[1\]"),
    ],
)
def test_a_label_that_the_model_lacks(label: Any, message: str, tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"text": "a", "label": 0}, {"text": "b", "label": label})
    with pytest.raises(InputError, match=rf"train\.jsonl.*2.*'label'.*{message}"):
        encode(rows, bert(tmp_path, **LABELS))


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["sci", "rec", "comp"], [0, 1, 2], [2, 1, 0]),  # the model's numbers, not the data's
        (["rec", "sci", "talk"], [0, 1], [1, 2]),
        (["x", "y", "z"], [0, 1, 2], [0, 1, 2]),
    ],
)
def test_numbers_with_names_in_the_data_are_those_names(
    names: list[str], labels: list[int], expected: list[int], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    data = datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features)
    data.save_to_disk(str(tmp_path / "data"))
    examples = encode(open_data(tmp_path / "data"), bert(tmp_path, **LABELS))
    assert first_batch(examples)[1].tolist() == expected
    assert any("class names" in note for note in examples.notes) == ("x" in names)
    if "talk" in names:
        data = datasets.Dataset.from_dict({"text": ["a"], "label": [2]}, features)
        data.save_to_disk(str(tmp_path / "talk"))
        with pytest.raises(InputError, match=r"expected one of the model's 3 labels, .* found 2"):
            encode(open_data(tmp_path / "talk"), bert(tmp_path, **LABELS))


def test_labels_without_names(tmp_path: Path) -> None:
    model = bert(tmp_path, num_labels=3)
    with pytest.raises(
        InputError, match="expected a label of the model, a number from 0 to 2, found 3"
    ):
        encode(jsonl(tmp_path, {"text": "a", "label": 3}), model)
    with pytest.raises(InputError, match=r"found 'sci'; .*LABEL_0.* count as none.*id2label"):
        encode(jsonl(tmp_path, {"text": "a", "label": "sci"}), model)


def test_columns_by_name(tmp_path: Path) -> None:
    model = bert(tmp_path, **LABELS)
    rows = csv(tmp_path, "body,topic\na cat,sci\n")
    with pytest.raises(
        InputError, match=r"expected a column 'text' or 'sentence', found 'body', 'topic'"
    ):
        encode(rows, model)
    with pytest.raises(InputError, match=r"'topik'.*; did you mean topic\? name .* --label-column"):
        encode(rows, model, Encoding(columns=Columns(text="body", label="topik")))
    examples = encode(rows, model, Encoding(columns=Columns(text="body", label="topic")))
    assert first_batch(examples)[1].tolist() == [2]


def test_a_row_without_a_text(tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"text": "a", "label": 0}, {"text": 7, "label": 0})
    with pytest.raises(InputError, match=r"2.*'text': expected a text, found int '7'"):
        encode(rows, bert(tmp_path, **LABELS))


def test_pairs_of_texts(tmp_path: Path) -> None:
    model = bert(tmp_path, **LABELS)
    rows = jsonl(tmp_path, {"premise": "the cat", "hypothesis": "a dog", "label": 1})
    inputs, _ = first_batch(encode(rows, model))
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    named = encode(rows, model, Encoding(columns=Columns(text="hypothesis", text_pair="premise")))
    expected = model.processor("a dog", "the cat")["input_ids"]
    assert first_batch(named)[0]["input_ids"].tolist() == [expected]


def test_long_texts_are_truncated_and_counted(tmp_path: Path) -> None:
    model = bert(tmp_path, **LABELS)
    texts = ["the cat sat on the mat", "rain", "a dog ate my homework"]
    rows = jsonl(tmp_path, *({"text": text, "label": 0} for text in texts))
    examples = encode(rows, model, Encoding(max_length=5))
    assert examples.notes_on() == ["2 of 3 texts were truncated to 5 tokens"]
    inputs, _ = first_batch(examples)
    assert inputs["input_ids"].shape == (3, 5)
    assert (inputs["input_ids"][[0, 2], -1] == model.processor.sep_token_id).all()
    rows = jsonl(tmp_path, {"text": "cat " * 50, "label": 0})
    examples = encode(rows, model)  # what the model takes
    assert first_batch(examples)[0]["input_ids"].shape == (1, 40)
    assert examples.notes_on() == ["1 of 1 texts were truncated to 40 tokens"]
    with pytest.raises(UsageError, match="expected at most 40, the limit of the model, found 41"):
        encode(rows, model, Encoding(max_length=41))
    with pytest.raises(UsageError, match="expected more than the 2 special tokens, found 2"):
        encode(rows, model, Encoding(max_length=2))


def test_truncated_texts_are_counted_among_those_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="consolidate")
    model = bert(tmp_path, **LABELS)
    lengths = (1, 1, 9, 1, 1, 9, 1, 9)
    rows = jsonl(tmp_path, *({"text": "cat " * n, "label": 0} for n in lengths))
    examples = encode(rows, model, Encoding(max_length=5))
    assert examples.notes_on([1, 2, 5]) == ["2 of 3 texts were truncated to 5 tokens"]
    assert examples.notes_on([0, 1]) == []
    assert Part(examples, [7, 0]).notes_on() == ["1 of 2 texts were truncated to 5 tokens"]
    chosen = subset(8, 3, seed=2)
    long = sum(lengths[i] > 5 for i in chosen)
    assert 0 < long < 3
    consolidate.fisher(
        tmp_path / "model", tmp_path / "train.jsonl", max_length=5, max_examples=3, seed=2
    )
    assert f"{long} of 3 texts were truncated to 5 tokens" in caplog.messages
    consolidate.finetune(
        tmp_path / "model",
        tmp_path / "train.jsonl",
        output_dir=tmp_path / "out",
        penalty="none",
        max_length=5,
        max_examples=3,
        fisher_max_examples=2,
        seed=2,
        task="b",
    )
    assert caplog.messages.count(f"{long} of 3 texts were truncated to 5 tokens") == 2


def test_texts_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    foreign = ({"text": "", "label": 0}, {"text": "привет мир", "label": 0})
    message = (
        r"train\.jsonl, row 2.*'text': all tokens of all texts, such as 'привет мир', are unknown "
        r"to the tokenizer in .*model, which is probably that of another model"
    )
    model = bert(tmp_path / "masked", "MaskedLM")
    for pack in (False, True):
        with pytest.raises(InputError, match=message):
            encode(jsonl(tmp_path, *foreign), model, Encoding(pack=pack))
    some = encode(jsonl(tmp_path, *foreign, {"text": "the cat"}), model)
    assert some.notes == ["2 of 3 rows have nothing to predict and were left out"]
    # a causal model would learn to write unknown tokens
    words = word_tokenizer()
    words.eos_token = "[SEP]"
    save(tmp_path / "causal" / "model", transformers.GPT2LMHeadModel, gpt2_config(), words)
    model = load_model(open_checkpoint(tmp_path / "causal" / "model"))
    with pytest.raises(InputError, match=message):
        encode(jsonl(tmp_path, *foreign), model)
    assert len(encode(jsonl(tmp_path, *foreign, {"text": "the cat"}), model)) == 3
    # a tokenizer that drops what it does not know
    letters = Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2}, []))
    model.processor = transformers.PreTrainedTokenizerFast(tokenizer_object=letters)
    with pytest.raises(InputError, match=message):
        encode(jsonl(tmp_path, *foreign), model)
    # a tokenizer whose own vocabulary lacks the token for what it does not know
    lacking = Tokenizer(models.WordLevel({"the": 0}, unk_token="[UNK]"))
    model.processor = transformers.PreTrainedTokenizerFast(tokenizer_object=lacking)
    with pytest.raises(InputError, match=r"model: the tokenizer cannot encode .*\[UNK\]"):
        encode(jsonl(tmp_path, *foreign), model)
    model = bert(tmp_path / "half", **LABELS)
    with pytest.raises(InputError, match=r"train\.jsonl: expected Unicode .* half a surrogate"):
        encode(jsonl(tmp_path, {"text": "the \ud800 cat", "label": 0}), model)
    # labels can be learned all the same
    classifier = bert(tmp_path / "labels", **LABELS)
    (note,) = encode(jsonl(tmp_path, foreign[1]), classifier).notes
    assert note.startswith("train.jsonl, row 1")
    assert "unknown to the tokenizer" in note


def test_positions_that_begin_behind_the_padding_token(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(vocab_size=60, pad_token_id=1, type_vocab_size=1, **SIZES)
    cls = transformers.RobertaForSequenceClassification
    save(tmp_path / "model", cls, config, word_tokenizer())
    model = load_model(open_checkpoint(tmp_path / "model"))
    rows = jsonl(tmp_path, {"text": "cat " * 50, "label": 0})
    inputs, labels = first_batch(encode(rows, model))
    assert inputs["input_ids"].shape == (1, 38)
    assert "token_type_ids" not in inputs
    assert model_outputs(model.module, inputs, labels).shape == (1, 2)


def test_a_classifier_on_a_decoder_pads_without_a_padding_token(tmp_path: Path) -> None:
    model = gpt2(tmp_path, transformers.GPT2ForSequenceClassification, num_labels=2)
    rows = jsonl(tmp_path, {"text": "the cat sat", "label": 0}, {"text": "rain", "label": 1})
    examples = encode(rows, model)
    inputs, labels = first_batch(examples)
    together = model_outputs(model.module, inputs, labels)
    alone = [model_outputs(model.module, *batch) for batch in examples.batches(1)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    model.module.config.pad_token_id, model.processor.pad_token = 7, "<|endoftext|>"
    inputs, _ = first_batch(encode(rows, model))  # where the last token is, the config says
    assert inputs["input_ids"][1, -1] == 7
    with pytest.raises(InputError, match="expected a text, found an empty one"):
        encode(jsonl(tmp_path, {"text": "", "label": 0}), model)


@pytest.mark.parametrize("wrong", ["no row", "negative"])
def test_a_padding_token_without_an_embedding_is_not_used(tmp_path: Path, wrong: str) -> None:
    tokenizer, config = byte_tokenizer(), gpt2_config(num_labels=2)
    if wrong == "no row":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config.pad_token_id = tokenizer.pad_token_id or -1
    save(tmp_path, transformers.GPT2ForSequenceClassification, config, tokenizer)
    model = load_model(open_checkpoint(tmp_path))
    rows = jsonl(tmp_path, {"text": "the cat sat", "label": 0}, {"text": "rain", "label": 1})
    examples = encode(rows, model)
    together = model_outputs(model.module, *first_batch(examples))
    alone = [model_outputs(model.module, *batch) for batch in examples.batches(1)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_several_labels(tmp_path: Path) -> None:
    model = bert(tmp_path, problem_type="multi_label_classification", **LABELS)
    rows = jsonl(
        tmp_path,
        {"text": "a", "labels": ["sci", "comp"]},
        {"text": "b", "labels": [0, 1, 1]},
        {"text": "c", "labels": []},
        {"text": "d", "labels": [2]},
    )
    labels = first_batch(encode(rows, model))[1]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]]
    written = csv(tmp_path, 'text,labels\na,"rec, sci"\nb,"[1, 0, 0]"\n')
    assert first_batch(encode(written, model))[1].tolist() == [[0, 1, 1], [1, 0, 0]]
    with pytest.raises(InputError, match=r"1.*'labels'.*'talk'"):
        encode(jsonl(tmp_path, {"text": "a", "labels": ["talk"]}), model)


def test_zeros_and_ones_are_no_names_of_labels(tmp_path: Path) -> None:
    names = {0: "0", 1: "1", 2: "2"}
    model = bert(
        tmp_path,
        problem_type="multi_label_classification",
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    written = csv(tmp_path, 'text,labels\na,"1,0,1"\nb,"0,0,0"\nc,"2,0"\n')
    assert first_batch(encode(written, model))[1].tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(("names", "found"), [("01", [[0, 1], [1, 0]]), ("10", [[1, 1], [1, 1]])])
def test_two_zeros_and_ones_are_no_names_if_the_names_count(
    tmp_path: Path, names: str, found: list[list[int]]
) -> None:
    model = bert(
        tmp_path,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    rows = csv(tmp_path, 'text,labels\na,"0,1"\nb,"1,0"\n')
    assert first_batch(encode(rows, model))[1].tolist() == found


def test_labels_that_only_look_like_numbers_keep_their_names(tmp_path: Path) -> None:
    rows = csv(tmp_path, "text,label\na,01\nb,02\nc,99\nd,2023_1\ne, 7\n")
    names = label_names(rows, "sequence-classification")
    assert names == ["01", "02", "2023_1", "7", "99"]
    ids = dict(enumerate(names))
    model = bert(tmp_path, id2label=ids, label2id={name: i for i, name in ids.items()})
    assert first_batch(encode(rows, model))[1].tolist() == [0, 1, 4, 2, 3]
    assert label_names(csv(tmp_path, "label\n02\n01\n"), "classification") == ["01", "02"]
    with pytest.raises(InputError, match=r"one of the model's 5 labels, 01, .*, found '1'"):
        encode(csv(tmp_path, "text,label\na,1\n"), model)
    assert label_names(csv(tmp_path, "label\n1\n01\n"), "classification") == ["01", "1"]


def test_whole_numbers_written_with_a_fraction_are_names(tmp_path: Path) -> None:
    rows = csv(tmp_path, "text,label\na,1.0\nb,2.0\n")
    names = label_names(rows, "sequence-classification")
    model = bert(tmp_path, id2label=dict(enumerate(names)), label2id={"1.0": 0, "2.0": 1})
    assert first_batch(encode(rows, model))[1].tolist() == [0, 1]
    with pytest.raises(InputError, match=r"one of the model's 2 labels, 1\.0, 2\.0, found '1'"):
        encode(csv(tmp_path, "text,label\na,1\n"), model)


def test_true_and_false_have_the_names_of_text_files(tmp_path: Path) -> None:
    model = bert(tmp_path, id2label={0: "TRUE", 1: "FALSE"}, label2id={"TRUE": 0, "FALSE": 1})
    lines = [{"text": "a", "label": True}, {"text": "b", "label": False}]
    assert first_batch(encode(jsonl(tmp_path, *lines), model))[1].tolist() == [0, 1]
    plain = bert(tmp_path / "plain")
    assert first_batch(encode(jsonl(tmp_path, *lines), plain))[1].tolist() == [1, 0]


def test_a_list_is_not_one_label(tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"text": "a", "label": "x"}, {"text": "b", "label": ["x", "y"]})
    with pytest.raises(InputError, match=r"row 2 .*one label, found a list of 2: .* multi-label"):
        label_values(rows, "sequence-classification")
    assert label_values(rows, "multi-label") == ["x", "y"]


def test_decimals_of_parquet_are_numbers(tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))

    def rows(*values: str) -> Rows:
        columns = {"text": ["a"] * len(values), "label": [Decimal(value) for value in values]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
        return open_data(tmp_path / "train.parquet")

    model = bert(tmp_path, **LABELS)
    assert first_batch(encode(rows("2.00", "0.00"), model))[1].tolist() == [2, 0]
    assert label_names(rows("2.00", "0.00"), "classification") == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"row 2.*class number per row, found 0\.5; .*regression"):
        label_values(rows("1.0", "0.5"), "classification")
    targets = encode(rows("1.50", "-2.00"), bert(tmp_path / "one", num_labels=1))
    assert first_batch(targets)[1].tolist() == [1.5, -2.0]


def test_a_column_of_ids_makes_no_head(tmp_path: Path) -> None:
    rows = csv(tmp_path, "text,label\na,3\nb,4000000000\n")
    with pytest.raises(InputError, match=r"row 2 .*from 0, of 2 classes, found 4000000000"):
        label_names(rows, "sequence-classification")
    rows = csv(tmp_path, "label\n" + "".join(f"id-{i}\n" for i in range(20)))
    with pytest.raises(InputError, match="another label in each of 20 rows, as in a column of ids"):
        label_names(rows, "sequence-classification")
    rows = csv(tmp_path, "label\nid-0\n" + "".join(f"id-{i}\n" for i in range(20)))
    assert len(label_names(rows, "sequence-classification")) == 20


def test_classes_that_the_data_state_are_a_first_head(tmp_path: Path) -> None:
    for i in range(1001, 1021):
        (tmp_path / f"images/{i}").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"images/{i}/a.png")
    names = label_names(open_data(tmp_path / "images"), "image-classification")
    assert names == [str(i) for i in range(1001, 1021)]


def test_a_folder_named_by_a_number_that_is_no_class_is_refused(tmp_path: Path) -> None:
    for name in ("1", "5", "6"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "a.png")
    model = bert(tmp_path, id2label={0: "5", 1: "6"}, label2id={"5": 0, "6": 1})
    rows = open_data(tmp_path / "images")
    reader = Labels(rows, "label", model, 2)
    assert [reader.index(name, 0) for name in ("5", "6")] == [0, 1]
    with pytest.raises(InputError, match="expected one of the model's 2 labels, 5, 6"):
        reader.index("1", 0)
    (tmp_path / "named").mkdir()
    model = bert(tmp_path / "named", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    reader = Labels(rows, "label", model, 2)  # whose numbers are used unchanged
    assert reader.index("1", 0) == 1


def test_regression(tmp_path: Path) -> None:
    model = bert(tmp_path, num_labels=1)
    assert model.objective.name == "regression"
    labels = first_batch(encode(csv(tmp_path, "text,label\na,1.5\nb,-2\n"), model))[1]
    assert labels.tolist() == [1.5, -2.0]
    for wrong, message in [
        ("many", "expected numbers"),
        ("nan", "finite numbers"),
        ("", "a number"),
    ]:
        with pytest.raises(InputError, match=rf"train\.csv.*'label'.*{message}"):
            encode(csv(tmp_path, f"text,label\na,{wrong}\n"), model)
    with pytest.raises(InputError, match="'label': the label is missing"):
        encode(jsonl(tmp_path, {"text": "a", "label": None}), model)


# --- words -------------------------------------------------------------------------------------


def test_words_label_their_first_token(tmp_path: Path) -> None:
    model = bert(tmp_path, "TokenClassification", **LABELS)
    rows = jsonl(
        tmp_path,
        {"tokens": ["the", "cat,sat", "on"], "ner_tags": ["comp", "sci", 1]},
        {"tokens": ["rain"], "ner_tags": [-100]},
        {"tokens": ["rain"], "ner_tags": [2]},
    )
    examples = encode(rows, model)
    assert examples.notes == ["1 of 3 rows have nothing to predict and were left out"]
    inputs, labels = first_batch(examples)
    # [CLS] the cat , sat on [SEP]
    assert labels.tolist() == [
        [-100, 0, 2, -100, -100, 1, -100],
        [-100, 2, -100, -100, -100, -100, -100],
    ]
    assert inputs["attention_mask"].sum(1).tolist() == [7, 3]
    assert default_estimator(model, examples) == "exact"
    tags = {"tokens": ["the"] * 6, "ner_tags": [0] * 6}  # 3 labels of each
    first = {"tokens": ["rain"], "ner_tags": [2]}
    assert default_estimator(model, encode(jsonl(tmp_path, first, tags), model)) == "mc"
    with pytest.raises(InputError, match="1 labels for 2 words"):
        encode(jsonl(tmp_path, {"tokens": ["a", "b"], "labels": [0]}), model)


def test_the_last_of_many_words_have_their_own_labels(tmp_path: Path) -> None:
    model = bert(tmp_path, "TokenClassification", **LABELS)
    model.processor.truncation_side = "left"
    count = 70_000
    words, tags = ["cat"] * count, [0] * (count - 2) + [1, 2]
    rows = jsonl(tmp_path, {"tokens": words, "labels": tags})
    _, labels = first_batch(encode(rows, model))
    assert labels[0].tolist()[-3:] == [1, 2, -100]


def test_byte_pairs_of_words_have_the_space_before_them(tmp_path: Path) -> None:
    cls = transformers.GPT2ForTokenClassification
    model = gpt2(tmp_path, cls, num_labels=2, pad_token_id=0)
    rows = jsonl(tmp_path, {"tokens": ["the", "cat", "sat"], "labels": [0, 1, 0]})
    inputs, labels = first_batch(encode(rows, model))
    text = model.processor("the cat sat")
    assert inputs["input_ids"].tolist() == [text["input_ids"]]
    assert (labels != -100).sum() == 3


# --- language models ---------------------------------------------------------------------------


def test_texts_continue_to_their_end(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    rows = jsonl(tmp_path, {"text": "the cat"}, {"text": "a dog ate my homework"}, {"text": ""})
    examples = encode(rows, model)
    assert len(examples) == 2
    assert examples.notes == ["1 of 3 rows have nothing to predict and were left out"]
    inputs, labels = first_batch(examples)
    ids = model.processor("the cat")["input_ids"]
    end = model.processor.eos_token_id
    assert labels[0].tolist()[: len(ids) + 2] == [*ids, end, -100]
    assert "token_type_ids" not in inputs
    present = inputs["attention_mask"].bool()
    assert torch.equal(labels[present], inputs["input_ids"][present])
    assert (labels[~present] == -100).all()
    outputs = model_outputs(model.module, inputs, labels)
    alone = model_outputs(model.module, *next(iter(examples.batches(1))))
    assert torch.allclose(outputs[:1, : alone.shape[1]], alone, atol=1e-5)


def test_packing_fills_sequences(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    rows = jsonl(tmp_path, *({"text": "the cat sat on the mat"} for _ in range(5)))
    ids = [*model.processor("the cat sat on the mat")["input_ids"], model.processor.eos_token_id]
    examples = encode(rows, model, Encoding(max_length=9, pack=True))
    blocks = [block for inputs, _ in examples.batches(1) for block in inputs["input_ids"].tolist()]
    # A single token left over at the end would predict nothing.
    assert [token for block in blocks for token in block] == (ids * 5)[:-1]
    assert len(ids * 5) % 9 == 1
    assert {len(block) for block in blocks} == {9}
    assert examples.notes == [f"5 texts fill {len(blocks)} sequences of 9 tokens"]
    with pytest.raises(UsageError, match="--pack is for language models"):
        encode(rows, bert(tmp_path / "bert"), Encoding(pack=True))


@pytest.mark.parametrize("kind", [bert, gpt2])
def test_reading_shows_how_far_it_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    shown: list[Any] = []

    @contextmanager
    def counted(*label: Any) -> Iterator[Callable[[int], None]]:
        shown.append(label)
        yield shown.append

    monkeypatch.setattr("consolidate.data.encoding.progress", counted)
    rows = jsonl(tmp_path, *[{"text": "the cat", "label": i % 2} for i in range(5)])
    encode(rows, kind(tmp_path))
    assert shown == [("reading train.jsonl", 5, "rows"), 1, 1, 1, 1, 1]


def test_the_completion_alone_is_predicted(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    rows = jsonl(tmp_path, {"prompt": "the cat", "completion": " sat on the mat"})
    inputs, labels = first_batch(encode(rows, model))
    before = model.processor("the cat")["input_ids"]
    after = [*model.processor(" sat on the mat")["input_ids"], model.processor.eos_token_id]
    assert inputs["input_ids"].tolist() == [before + after]
    assert labels.tolist() == [[-100] * len(before) + after]
    short = encode(rows, model, Encoding(max_length=len(after) + 1))
    inputs, labels = first_batch(short)
    assert inputs["input_ids"].tolist() == [before[-1:] + after]
    assert labels.tolist() == [[-100, *after]]
    cut = f"1 of 1 texts were truncated to {len(after) + 1} tokens"
    assert short.notes_on() == [cut, "train.jsonl: loss on the completions"]


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = gpt2(tmp_path)
    messages = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "again"}]
    rows = jsonl(tmp_path, {"messages": messages})
    with pytest.raises(InputError, match="messages need a chat template"):
        encode(rows, model)
    model.processor.chat_template = template
    _, labels = first_batch(encode(rows, model))
    assert model.processor.decode(labels[0]) == "user: rain\nassistant: again\n"
    with pytest.raises(InputError, match=r"'messages': expected a list of messages with role"):
        encode(jsonl(tmp_path, {"messages": [1, 2]}, name="numbers.jsonl"), model)
    model.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        InputError, match=r"'messages'.*refuses these messages.*roles must alternate"
    ):
        encode(rows, model)


def test_masks_depend_on_example_and_epoch_alone(tmp_path: Path) -> None:
    model = bert(tmp_path, "MaskedLM")
    rows = jsonl(tmp_path, *({"text": f"{'the cat sat on the mat ' * (i + 1)}"} for i in range(5)))
    examples = encode(rows, model, seed=3)
    together, labels = first_batch(examples)
    for i, (inputs, alone) in enumerate(examples.batches(1)):
        length = inputs["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][0], together["input_ids"][i, :length])
        assert torch.equal(alone[0], labels[i, :length])
        assert (alone != -100).any()
    shuffled, _ = first_batch(examples, order=[3])
    length = shuffled["input_ids"].shape[1]
    assert torch.equal(shuffled["input_ids"][0], together["input_ids"][3, :length])
    assert not torch.equal(examples.collate(range(len(examples)), epoch=1)[1], labels)
    assert not torch.equal(first_batch(encode(rows, model, seed=4))[1], labels)
    special = torch.tensor(model.processor.all_special_ids)
    assert not torch.isin(labels, special[special >= 0]).any()


def test_shares_of_masks(tmp_path: Path) -> None:
    model = bert(tmp_path, "MaskedLM")
    rows = jsonl(tmp_path, *({"text": "the cat sat on the mat " * 6} for _ in range(300)))
    examples = encode(rows, model)
    inputs, labels = first_batch(examples, 300)
    original = torch.tensor(model.processor("the cat sat on the mat " * 6)["input_ids"])
    chosen = labels != -100
    assert torch.equal(labels[chosen], original.expand_as(labels)[chosen])
    assert float(chosen[:, 1:-1].float().mean()) == pytest.approx(0.15, abs=0.015)
    masked = inputs["input_ids"][chosen] == model.processor.mask_token_id
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.04)
    assert torch.equal(inputs["input_ids"][~chosen], original.expand_as(labels)[~chosen])
    assert int(inputs["input_ids"].max()) < len(model.processor)
    replaced = inputs["input_ids"][chosen][~masked]
    assert len(replaced.unique()) > len(model.processor) // 2
    kept = inputs["input_ids"][chosen] == original.expand_as(labels)[chosen]
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.03)


def test_tokens_outside_the_embedding_never_replace_others(tmp_path: Path) -> None:
    model = bert(tmp_path, "MaskedLM")
    embedded = len(model.module.get_input_embeddings().weight)
    model.processor.add_tokens([f"new{i}" for i in range(1000)])
    rows = jsonl(tmp_path, *({"text": "the cat sat on the mat " * (i + 1)} for i in range(6)))
    examples = encode(rows, model)
    for epoch in range(20):
        inputs, labels = examples.collate(range(6), epoch)
        assert int(inputs["input_ids"].max()) < embedded
        assert int(labels.max()) < embedded


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"text": "the cat sat", "label": 1, "chat": [], "say": "x", "more": "y"})
    rewriting = Columns(text="text", prompt="say", completion="more", target="text", label="label")
    for objective, given, unread in (
        ("masked-lm", Columns(label="label"), ["label"]),
        ("masked-lm", Columns(text="text"), []),
        ("causal-lm", Columns(messages="chat", text="text", prompt="say"), ["prompt", "text"]),
        ("causal-lm", Columns(completion="more", text="text"), ["text"]),
        ("causal-lm", Columns(image="say"), ["image"]),
        ("seq2seq-lm", rewriting, ["completion", "label", "prompt"]),
        ("token-classification", Columns(tokens="text", text="say"), ["text"]),
        ("sequence-classification", Columns(inputs="text", text_pair="say"), ["inputs"]),
        ("image-classification", Columns(image="text", text="text"), ["text"]),
    ):
        notes = [
            f"the {role} column {getattr(given, role)!r} is not used for {objective}"
            for role in unread
        ]
        assert unread_columns(given, get_objective(objective, factory=False)) == notes
    examples = encode(
        rows,
        bert(tmp_path / "bert", "MaskedLM"),
        Encoding(columns=Columns(text="text", label="label")),
    )
    assert "the label column 'label' is not used for masked-lm" in examples.notes


def test_one_text_becomes_another(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    cls = transformers.T5ForConditionalGeneration
    save(tmp_path / "model", cls, config, tokenizer)
    model = load_model(open_checkpoint(tmp_path / "model"))
    rows = jsonl(
        tmp_path,
        {"text": "the cat sat", "target": "a dog"},
        {"text": "rain", "target": "rain, and again rain"},
    )
    examples = encode(rows, model)
    inputs, labels = first_batch(examples)
    assert labels[0].tolist() == [*tokenizer("a dog")["input_ids"], *[-100] * 3]
    one, two = (
        encode(jsonl(tmp_path, row, name=f"{i}.jsonl"), model) for i, row in enumerate(rows)
    )
    joined = WithReplay(one, two, seed=0).collate([0, ~0])
    assert all(torch.equal(joined[0][name], inputs[name]) for name in inputs)
    assert torch.equal(joined[1], labels)
    assert encode(rows, model, Encoding(max_length=5)).notes_on() == [
        "1 of 4 texts were truncated to 5 tokens"
    ]
    assert model_outputs(model.module, inputs, labels).shape == (2, 7, len(tokenizer))


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    save(tmp_path / "model", transformers.GPT2LMHeadModel, gpt2_config())
    model = load_model(open_checkpoint(tmp_path / "model"))
    with pytest.raises(InputError, match="expected a tokenizer, found none"):
        encode(jsonl(tmp_path, {"text": "a"}), model)


# --- images ------------------------------------------------------------------------------------


def image_folder(folder: Path, mode: str = "L") -> Rows:
    for label in ("rec", "comp"):
        (folder / label).mkdir(parents=True)
        for i in range(2):
            shade = 40 * i + (100 if label == "rec" else 0)
            colour = shade if mode == "L" else (shade, 0, 0)
            Image.new(mode, (10, 12), colour).save(folder / label / f"{i}.png")
    return open_data(folder)


def vit(folder: Path, channels: int = 3, **options: Any) -> Model:
    sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=channels, **sizes, **options
    )
    processor = transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.25] * channels
    )
    save(folder / "model", transformers.ViTForImageClassification, config, processor)
    return load_model(open_checkpoint(folder / "model"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_by_folder(mode: str, channels: int, tmp_path: Path) -> None:
    model = vit(tmp_path, channels, **LABELS)
    examples = encode(image_folder(tmp_path / "images", mode), model)
    inputs, labels = first_batch(examples)
    assert labels.tolist() == [0, 0, 1, 1]
    assert inputs["pixel_values"].shape == (4, channels, 8, 8)
    if mode == "L":
        shades = torch.tensor([0, 40, 100, 140]) / 255
        expected = ((shades - 0.5) / 0.25)[:, None, None, None].expand(4, channels, 8, 8)
        assert torch.allclose(inputs["pixel_values"], expected, atol=1e-5)
    assert model_outputs(model.module, inputs, labels).shape == (4, 3)


def test_classes_without_names_take_the_folders_order(tmp_path: Path) -> None:
    rows = image_folder(tmp_path / "images")
    examples = encode(rows, vit(tmp_path, num_labels=2))
    assert first_batch(examples)[1].tolist() == [0, 0, 1, 1]
    assert any("comp, rec" in note for note in examples.notes)
    with pytest.raises(InputError, match=r"expected a label of the model, .* found 'comp'"):
        encode(rows, vit(tmp_path / "three", num_labels=3))


def test_images_need_a_processor(tmp_path: Path) -> None:
    model = vit(tmp_path, num_labels=2)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    model = load_model(open_checkpoint(tmp_path / "model"))
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        encode(image_folder(tmp_path / "images"), model)


# --- tensors -----------------------------------------------------------------------------------

OWN = """
from torch import nn

def make(config):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, config.get("outputs", 3)), nn.BatchNorm1d(3))

def one():
    return nn.Linear(6, 1)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_of_examples.py").write_text(OWN)
    monkeypatch.delitem(__import__("sys").modules, "own_of_examples", raising=False)
    import own_of_examples

    def load(function: str = "make", dtype: torch.dtype | None = None, **options: Any) -> Model:
        module = own_of_examples.make({}) if function == "make" else own_of_examples.one()
        torch.save(module.state_dict(), tmp_path / "own.pt")
        factory = f"own_of_examples:{function}"
        checkpoint = open_checkpoint(tmp_path / "own.pt")
        return load_model(checkpoint, factory=factory, dtype=dtype, **options)

    return load


def tensors(folder: Path, **columns: torch.Tensor) -> Rows:
    save_file(columns, folder / "data.safetensors")
    return open_data(folder / "data.safetensors")


def test_tensors_are_batched_as_they_are(own: Any, tmp_path: Path) -> None:
    inputs = torch.rand(7, 2, 3, dtype=torch.float64)
    rows = tensors(tmp_path, inputs=inputs, labels=torch.arange(7) % 3)
    model = own()
    state = {name: value.clone() for name, value in model.module.state_dict().items()}
    examples = encode(rows, model)
    batches = list(examples.batches(3, order=[6, 5, 4, 3, 2, 1, 0]))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs.flip(0).float())
    assert torch.cat([y for _, y in batches]).tolist() == [0, 2, 1, 0, 2, 1, 0]
    for name, value in model.module.state_dict().items():  # looking at the outputs moves nothing
        assert torch.equal(value, state[name]), name
    wide = encode(rows, own(dtype=torch.float64))
    assert next(iter(wide.batches(7)))[0].dtype == torch.float64


def test_lists_of_numbers_are_tensors_too(own: Any, tmp_path: Path) -> None:
    rows = jsonl(tmp_path, *({"inputs": [i, 1, 2, 3, 4, 5], "label": i} for i in range(3)))
    with pytest.raises(InputError, match="does not accept inputs"):
        encode(rows, own())  # integers are not for a linear layer
    rows = jsonl(tmp_path, *({"inputs": [i + 0.5] * 6, "label": i} for i in range(3)))
    inputs, labels = first_batch(encode(rows, own()))
    assert inputs[:, 0].tolist() == [0.5, 1.5, 2.5]
    assert labels.tolist() == [0, 1, 2]
    ragged = jsonl(tmp_path, {"inputs": [1.0] * 6, "label": 0}, {"inputs": [1.0], "label": 0})
    with pytest.raises(
        InputError, match=r"2.*expected the shape \[6\] of the first row, found \[1\]"
    ):
        encode(ragged, own())


def test_lists_of_numbers_are_written_as_text_in_csv(own: Any, tmp_path: Path) -> None:
    text = 'inputs,label\n"0,1,2,3,4,5.5",0\n"[1, 1, 2, 3, 4, 5]",1\n'
    inputs, labels = first_batch(encode(csv(tmp_path, text), own()))
    assert inputs.dtype == torch.float32
    assert inputs.tolist() == [[0, 1, 2, 3, 4, 5.5], [1, 1, 2, 3, 4, 5]]
    assert labels.tolist() == [0, 1]
    for cell in ("one,two", "[[1], [2]]"):
        with pytest.raises(InputError, match=r"row 1 .*column 'inputs': expected numbers"):
            encode(csv(tmp_path, f'inputs,label\n"{cell}",0\n'), own())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3]), "row 3, column 'labels': expected a label .*, found 3"),
        (torch.tensor([0, -1, 1]), "row 2, column 'labels': expected a label .*, found -1"),
        (torch.tensor([0.0, 1.0, 0.5]), "row 3, column 'labels': expected a label .*, found 0.5"),
        (torch.zeros(3, 3), r"row 1.*expected one class number per row, found rows of shape \[3\]"),
    ],
)
def test_class_numbers_are_checked(labels: Any, message: str, own: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        encode(tensors(tmp_path, inputs=torch.rand(3, 6), labels=labels), own())


def test_a_null_among_inputs_is_named_by_its_row(own: Any, tmp_path: Path) -> None:
    rows = [{"inputs": [1.0, value], "label": 0} for value in (2.0, None)]
    with pytest.raises(InputError, match=r"row 2 .*'inputs': expected numbers, found"):
        encode(jsonl(tmp_path, *rows), own())


def test_numbers_where_classes_are_expected(own: Any, tmp_path: Path) -> None:
    where, hint = (
        r"row {}( \(line \d\))?, column 'label'",
        "for numbers as targets use --objective regression",
    )
    wrong = {
        "several": (torch.rand(3, 3), [[0.5, 1.5, 2.5]] * 3, 1, r"rows of shape \[3\]"),
        "one": (torch.tensor([1, 0.5, 0.25]), [1, 0.5, 0.25], 2, "0.5"),
    }
    for stored, written, row, found in wrong.values():
        in_tensors = tensors(tmp_path, inputs=torch.rand(3, 6), label=stored)
        lines = [{"inputs": [0.5] * 6, "label": value} for value in written]
        message = where.format(row) + f": expected one class number per row, found {found}; {hint}"
        for rows in (in_tensors, jsonl(tmp_path, *lines)):
            with pytest.raises(InputError, match=message):
                label_values(rows, "classification", used=True)
            with pytest.raises(InputError, match=f"{where.format(row)}.* {found}; {hint}"):
                encode(rows, own())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_numbers(dtype: str, suffix: str, own: Any, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).random((4, 6), np.float32)

    def rows(labels: Any, inputs: Any = inputs) -> Rows:
        columns = {"inputs": inputs, "labels": np.array(labels, dtype)}
        path = tmp_path / f"unsigned.{suffix}"
        if suffix == "npz":
            np.savez(path, **columns)
        else:
            save_file({name: torch.from_numpy(values) for name, values in columns.items()}, path)
        return open_data(path)

    def labels(rows: Rows, *model: Any, **options: Any) -> Any:
        return first_batch(encode(rows, own(*model, **options)))[1].tolist()

    assert labels(rows([2, 0, 1, 1])) == [2, 0, 1, 1]
    assert labels(rows([[2], [0], [1], [1]])) == [2, 0, 1, 1]
    assert label_names(rows([2, 0, 1, 1]), "classification") == ["0", "1", "2"]
    several = [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert labels(rows(several), objective="multi-label") == several
    assert labels(rows([7, 0, 65535, 1]), "one", objective="regression") == [7, 0, 65535, 1]
    with pytest.raises(InputError, match=r"row 3, column 'labels': expected a label .*, found 3"):
        labels(rows([2, 0, 3, 1]))
    if dtype == "uint64":
        for objective in ("classification", "multi-label", "regression"):
            with pytest.raises(
                InputError, match=rf"row 2, column 'labels': expected .*, found {2**63 + 1}"
            ):
                labels(rows([0, 2**63 + 1, 0, 0]), objective=objective)
        with pytest.raises(
            InputError, match=rf"row 2, column 'labels': expected .*, found {2**63 + 1}"
        ):
            label_values(rows([0, 2**63 + 1, 0, 0]), "classification")

    ids = np.array([[1, 2], [3, 4], [0, 5], [5, 5]], dtype)
    module = torch.nn.Sequential(torch.nn.Embedding(6, 2), torch.nn.Flatten())
    given = encode(rows([2, 0, 1, 1], ids), replace(own(), module=module))
    assert first_batch(given)[0].dtype == torch.int64
    assert first_batch(given)[0].tolist() == ids.tolist()


def test_inputs_that_the_module_cannot_take(own: Any, tmp_path: Path) -> None:
    rows = tensors(tmp_path, inputs=torch.rand(3, 5), labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match=r"row 1, column 'inputs'.*shape \[1, 5\]"):
        encode(rows, own())
    with pytest.raises(InputError, match="expected a column 'inputs' or"):
        encode(tensors(tmp_path, pixels=torch.rand(3, 5)), own())


def test_regression_on_tensors(own: Any, tmp_path: Path) -> None:
    rows = tensors(tmp_path, inputs=torch.rand(3, 6), label=torch.tensor([0.5, 1.0, 2.0]))
    model = own("one", objective="regression")
    assert first_batch(encode(rows, model))[1].tolist() == [0.5, 1.0, 2.0]
    bad = tensors(tmp_path, inputs=torch.rand(3, 6), label=torch.tensor([0.5, torch.nan, 2.0]))
    with pytest.raises(
        InputError, match="row 2, column 'label': expected finite numbers, found nan"
    ):
        encode(bad, model)


# --- with the rest -----------------------------------------------------------------------------


def test_the_fisher_takes_what_is_encoded(tmp_path: Path) -> None:
    model = bert(tmp_path, **LABELS)
    rows = jsonl(tmp_path, *({"text": "the cat " * (i + 1), "label": i % 3} for i in range(5)))
    examples = encode(rows, model)
    one, three = (
        fisher_diagonal(model.module, examples.batches(size), model.objective.likelihood)
        for size in (1, 3)
    )
    assert one.examples == three.examples == 5
    for name in one:
        assert torch.allclose(one[name], three[name], rtol=1e-3, atol=1e-8), name
    stored = model.layout.to_file(one)
    assert list(stored) == list(model.checkpoint.weights)


def test_names_of_labels_in_the_data(tmp_path: Path) -> None:
    rows = jsonl(tmp_path, {"label": "sci"}, {"label": "comp"}, {"label": "sci"})
    assert label_names(rows, "sequence-classification") == ["comp", "sci"]
    assert label_names(csv(tmp_path, "label\n10\n2\n"), "sequence-classification") == [
        str(i) for i in range(11)
    ]
    rows = jsonl(tmp_path, {"labels": ["b", "a"]}, {"labels": ["c"]})
    assert label_names(rows, "multi-label") == ["a", "b", "c"]
    rows = jsonl(tmp_path, {"tags": [0, -100, 2]})
    assert label_names(rows, "token-classification") == ["0", "1", "2"]
    assert label_names(csv(tmp_path, "label\n0.5\n"), "regression") == []
    rows = jsonl(tmp_path, {"label": [0.5, 1.5]})
    assert label_names(rows, "regression") == ["0", "1"]
    assert label_names(tensors(tmp_path, label=torch.rand(3)), "regression") == []
    assert label_names(tensors(tmp_path, label=torch.rand(3, 2)), "regression") == ["0", "1"]
    assert label_names(image_folder(tmp_path / "images"), "image-classification") == ["comp", "rec"]
    with pytest.raises(InputError, match=r"2.*'label': the label is missing"):
        label_names(jsonl(tmp_path, {"label": "a"}, {"label": None}), "sequence-classification")


class Numbers(Examples):
    """Example i is the number i."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def collate(self, indices: Any, epoch: int = 0) -> tuple[Any, torch.Tensor]:
        return torch.tensor([float(i) for i in indices]), torch.tensor(indices) + 1000 * epoch


@pytest.mark.parametrize(("count", "held"), [(2, 1), (3, 1), (80, 40), (200, 50), (1000, 100)])
def test_what_is_held_out_is_a_seeded_part(count: int, held: int) -> None:
    rest, out = hold_out(Numbers(count), 0)
    assert (len(rest), len(out)) == (count - held, held)
    numbers = [next(part.batches(count))[1].tolist() for part in (rest, out)]
    assert sorted(numbers[0] + numbers[1]) == list(range(count))
    assert next(hold_out(Numbers(count), 0)[1].batches(count))[1].tolist() == numbers[1]


def test_much_data_is_held_out_in_part_and_one_example_not_at_all() -> None:
    assert len(hold_out(Numbers(100_000), 0)[1]) == 5000
    assert next(hold_out(Numbers(100), 1)[1].batches(50))[1].tolist() != list(range(50))
    with pytest.raises(InputError, match="--validation"):
        hold_out(Numbers(1), 0)


def test_a_part_keeps_order_and_epochs() -> None:
    part = Part(Numbers(9), [7, 2, 5])
    assert part.collate([2, 0], epoch=3)[1].tolist() == [3005, 3007]
    assert [part.length(i) for i in range(3)] == [1, 1, 1]


class Sized(Numbers):
    """Examples whose lengths are the digits of their indices."""

    def length(self, i: int) -> int:
        return i % 10


def test_the_longest_come_first() -> None:
    examples = Sized(25)
    order = [3, 14, 9, 4, 1, 12, 22, 0]
    assert examples.longest_first(order) == [9, 14, 4, 3, 12, 22, 1, 0]
    assert examples.longest_first(order, 3) == [9, 14, 3, 4, 12, 1, 22, 0]
    assert Part(examples, order).longest_first() == [2, 1, 3, 0, 5, 6, 4, 7]
    assert examples.longest_first()[:4] == [9, 19, 8, 18]
    for alike in ([3, 13, 23], []):
        assert examples.longest_first(alike, 2) is alike
    assert Numbers(5).longest_first() == range(5)
