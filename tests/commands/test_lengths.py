"""Texts of unlike lengths, which are read by length."""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import consolidate
from consolidate.commands import measurement, pass_cost
from consolidate.data.examples import Examples, subset
from consolidate.data.text_examples import TextExamples
from consolidate.estimation import compensated_sums
from consolidate.estimation.estimates import FisherDiagonal
from support.faults import kill_after, killed_and_resumed
from support.folders import contents
from support.tiny_models import bert_config, byte_tokenizer, gpt2_config, save, word_tokenizer
from support.together import ended, started

KINDS = ("classification", "tagging", "masked", "causal")
WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to"]


def make(folder: Path, kind: str = "classification", count: int = 23) -> tuple[Path, Path]:
    """Write a model in float64, and texts of 1 to 30 words, or to 9 where a word is many tokens."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        words = draw.choices(WORDS, k=draw.randint(1, 9 if kind == "causal" else 30))
        if kind == "tagging":
            rows.append({"tokens": words, "tags": [len(word) % 2 for word in words]})
        else:
            rows.append({"text": " ".join(words)} | ({"label": i % 2} if kind[1] == "l" else {}))
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = {"classification": "SequenceClassification", "tagging": "TokenClassification"}
    if kind == "causal":
        parts: tuple[Any, ...] = (transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    else:
        cls = getattr(transformers, f"BertFor{head.get(kind, 'MaskedLM')}")
        parts = (cls, bert_config(), word_tokenizer())
    return save(folder / "model", *parts, dtype=torch.float64), data


def as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read texts in the order of the data."""
    monkeypatch.setattr(
        Examples, "longest_first", lambda self, order=None, window=None: order or range(len(self))
    )


class Seen:
    """What commands read: the shapes of the batches, and the Fishers that were measured."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.order: list[int] = []
        self.diagonals: list[FisherDiagonal] = []

    @property
    def padded(self) -> int:
        """The number of tokens, with padding."""
        return sum(count * length for count, length in self.shapes)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What commands read from now on."""
    seen = Seen()
    collate, measure = TextExamples.collate, measurement.fisher_diagonal

    def collated(self: Any, indices: Sequence[int], epoch: int = 0) -> Any:
        inputs, labels = collate(self, indices, epoch)
        seen.shapes.append(tuple(inputs["input_ids"].shape))
        return inputs, labels

    def measured(*arguments: Any, **options: Any) -> FisherDiagonal:
        seen.order[:] = options["indices"]
        seen.shapes.clear()  # of what the estimator was chosen by
        seen.diagonals.append(measure(*arguments, **options))
        return seen.diagonals[-1]

    monkeypatch.setattr(TextExamples, "collate", collated)
    for module in (measurement, pass_cost):
        monkeypatch.setattr(module, "fisher_diagonal", measured)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_is_that_of_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, kind: str
) -> None:
    model, data = make(tmp_path, kind)
    options = {"batch_size": 4, "accumulate_dtype": "float64", "structure": "inputs"}
    consolidate.fisher(model, data, output_dir=tmp_path / "sorted", **options)
    padded, lengths = seen.padded, [length for _, length in seen.shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    with monkeypatch.context() as patched:
        as_given(patched)
        consolidate.fisher(model, data, output_dir=tmp_path / "given", **options)
    assert padded < 0.85 * seen.padded
    by_length, given = seen.diagonals
    assert (by_length.examples, by_length.units) == (given.examples, given.units)
    assert by_length.units == given.examples or kind != "classification"
    largest = max(float(values.max()) for values in given.values())
    for found, expected in ((by_length, given), (by_length.factors, given.factors)):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert values.dtype == torch.float64
            torch.testing.assert_close(found[name], values, rtol=1e-12, atol=1e-15 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_that_of_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen, kind: str
) -> None:
    model, data = make(tmp_path, kind)
    by_length = consolidate.evaluate(model, data={"a": data}, batch_size=4)
    padded = seen.padded
    seen.shapes.clear()
    as_given(monkeypatch)
    given = consolidate.evaluate(model, data={"a": data}, batch_size=4)
    assert padded < 0.85 * seen.padded
    assert by_length["a"] == pytest.approx(given["a"], rel=1e-12)


def test_squares_of_whole_batches_keep_the_order(tmp_path: Path, seen: Seen) -> None:
    model, data = make(tmp_path)
    consolidate.fisher(model, data, estimator="batched", batch_size=4)
    assert seen.order == list(range(23))


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.5}])
def test_a_killed_pass_resumes_to_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(compensated_sums, "FOLDED_BATCHES", 3)  # not where a window ends
    model, data = make(tmp_path, count=90)
    options = {**options, "batch_size": 4, "save_every_minutes": 0, "estimator": "mc"}
    whole, again = (
        consolidate.fisher(model, data, **options, output_dir=tmp_path / name)
        for name in ("whole", "again")
    )
    assert contents(tmp_path / "whole") == contents(tmp_path / "again")
    assert whole["examples"] == again["examples"] >= 64
    killed = tmp_path / "killed"
    command = partial(consolidate.fisher, model, data, **options, output_dir=killed)
    kills = [partial(kill_after, monkeypatch, examples) for examples in (22, 50)]
    resumed = killed_and_resumed(command, killed, caplog, *kills)
    assert resumed["examples"] == whole["examples"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_tolerance_ends_with_a_window_of_random_texts(
    tmp_path: Path, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="consolidate")
    model, data = make(tmp_path, count=300)
    options = {"batch_size": 4, "tolerance": 0.4, "seed": 3, "max_length": 20}
    result = consolidate.fisher(model, data, **options)
    (diagonal,), read = seen.diagonals, result["examples"]
    assert 64 <= read < 300
    assert read % (4 * measurement.WINDOW) == 0
    assert max(diagonal.relative_errors.values()) <= 0.4
    drawn = subset(300, None, 3, shuffled=True)
    assert seen.order[:read] != drawn[:read]
    for end in range(16, read + 1, 16):
        assert sorted(seen.order[:end]) == sorted(drawn[:end])
    texts = [json.loads(line)["text"].split() for line in data.read_text().splitlines()]
    cut = sum(len(texts[i]) > 18 for i in drawn[:read])
    assert f"{cut} of {read} texts were truncated to 20 tokens" in caplog.messages


@pytest.mark.parametrize("tolerance", [None, 0.4])
def test_two_processes_read_texts_of_like_lengths_at_a_time(
    tmp_path: Path, seen: Seen, tolerance: float | None
) -> None:
    model, data = make(tmp_path, "tagging", count=203)
    options = {"accumulate_dtype": "float64", "tolerance": tolerance}
    # Windows of one process with twice the batch size are those of two.
    consolidate.fisher(model, data, **options, batch_size=6, output_dir=tmp_path / "one")
    (alone,), order = seen.diagonals, list(seen.order)

    def record() -> None:
        measure = measurement.fisher_diagonal

        def measured(*arguments: Any, **options: Any) -> FisherDiagonal:
            diagonal = measure(*arguments, **options)
            lengths = [length for _, length in seen.shapes]
            found = [list(options["indices"]), lengths, diagonal.examples, dict(diagonal)]
            torch.save(found, tmp_path / f"{options['group'].rank()}.pt")
            return diagonal

        measurement.fisher_diagonal = measured

    words = ["fisher", str(model), "--data", str(data), "--batch-size", "3", "--output-dir"]
    words += [str(tmp_path / "two"), "--accumulate-dtype", "float64"]
    words += [] if tolerance is None else ["--tolerance", str(tolerance)]
    log = tmp_path / "log"
    assert ended(started(2, words, log, record)) == [0, 0], log.read_text()
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert sorted(both[0][0] + both[1][0]) == sorted(order) == list(range(203))
    for first, second in zip(both[0][1], both[1][1], strict=True):
        assert first >= second
    for _, lengths, examples, values in both:
        assert examples == alone.examples
        assert (tolerance is not None) == (examples < 203)
        assert tolerance is not None or lengths == sorted(lengths, reverse=True)
        for name, expected in alone.items():
            torch.testing.assert_close(values[name], expected, rtol=1e-12, atol=1e-17)


def test_a_dry_run_reads_the_longest_texts_first(tmp_path: Path, seen: Seen) -> None:
    model, data = make(tmp_path, count=100)
    cost = consolidate.fisher(model, data, batch_size=4, dry_run=True, output_dir=tmp_path / "out")
    lengths = [length for _, length in seen.shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 32  # tokens: 30 words, and two that mark the ends
    assert len(lengths) == 1 + pass_cost.SAMPLED_BATCHES
    assert cost["seconds"] > 0


def test_a_batch_that_is_too_large_fails_first(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "consolidate")
    model, data = make(tmp_path)
    options = {"batch_size": 4, "accumulate_dtype": "float64"}
    consolidate.fisher(model, data, output_dir=tmp_path / "whole", **options)
    embed = torch.nn.Embedding.forward

    def limited(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if ids.numel() > 70 and self.num_embeddings > 2:
            raise torch.OutOfMemoryError("out of memory")
        return embed(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", limited)
    consolidate.fisher(model, data, output_dir=tmp_path / "halved", **options)
    assert caplog.text.count("out of memory with") == 1
    whole, halved = seen.diagonals
    assert halved.examples == whole.examples == 23
    for name, expected in whole.items():
        torch.testing.assert_close(halved[name], expected, rtol=1e-12, atol=1e-17)
