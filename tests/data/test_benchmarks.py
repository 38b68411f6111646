"""Scores on local task files, against the harness called directly with the saved checkpoint."""

import json
import random
import warnings
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from consolidate.api import evaluate, finetune, fisher, run, show
from consolidate.data import benchmark_files, benchmarks
from consolidate.data.benchmark_files import benchmark_content
from consolidate.data.benchmarks import open_benchmark
from consolidate.models.adapters import load
from formats.checkpoint import open_checkpoint
from formats.errors import InputError, UsageError
from formats.fisher_json import read_ledger
from support import together
from support.command_line import run as typed
from support.tiny_models import CORPUS, SIZES, bert_config, byte_tokenizer, save, word_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

CHOICE: dict[str, Any] = {
    "task": "ends",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "ends.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 2.0},
}
LIKELY = {
    "task": "likely",
    "output_type": "loglikelihood",
    "doc_to_target": "{{choices[gold]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    ],
}
GENERATED = """
include: choice.yaml
task: spoken
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["the"], max_gen_toks: 6}
num_fewshot: 2
fewshot_split: test
process_results: !function spoken.measured
metric_list:
  - {metric: letters, aggregation: mean, higher_is_better: true}
"""
CODE = """
import random, torch
def measured(doc, results):
    print("noise", random.random(), torch.rand(1))
    return {"letters": sum(map(ord, results[0])) / 1000}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files and their data, not in the current folder; datasets' cache is as short-lived."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "tasks"
    place.mkdir()
    draw = random.Random(0)
    docs = []
    for text in CORPUS * 4:
        start, _, end = text.partition(" ")
        ends = [end, "rain", draw.choice(CORPUS)]
        docs.append({"context": start, "choices": ends, "gold": draw.randrange(3)})
    (place / "ends.jsonl").write_text("\n".join(map(json.dumps, docs)))
    write(place / "choice.yaml", CHOICE)
    write(place / "likely.yaml", {"include": "choice.yaml", "doc_to_choice": None, **LIKELY})
    (place / "spoken.yaml").write_text(GENERATED)
    (place / "spoken.py").write_text(CODE)
    return place


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A language model that draws in training, on the words of the tasks."""
    sizes = {**SIZES, "max_position_embeddings": 80}
    config = transformers.LlamaConfig(
        vocab_size=len(byte_tokenizer()), num_key_value_heads=1, attention_dropout=0.3, **sizes
    )
    return save(tmp_path / "llama", transformers.LlamaForCausalLM, config, byte_tokenizer())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in CORPUS * 3))
    return path


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def direct(checkpoint: Path, file: Path, batch_size: int) -> dict[str, float]:
    """What the harness finds by its own way, with a model of its own."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    with chdir(file.parent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[str(file)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
            random_seed=3,
            numpy_random_seed=3,
            torch_random_seed=3,
            fewshot_random_seed=3,
        )
    (values,) = found["results"].values()
    return {key.split(",")[0]: value for key, value in values.items() if key.endswith(",none")}


@pytest.mark.parametrize(
    ("file", "score"),
    [("choice.yaml", "acc"), ("likely.yaml", "minus perplexity"), ("spoken.yaml", "letters")],
)
def test_the_score_is_that_of_the_harness(
    llama: Path, folder: Path, capsys: pytest.CaptureFixture[str], file: str, score: str
) -> None:
    at = folder / file
    expected = direct(llama, at, 4)
    capsys.readouterr()
    code, out, err = typed(
        capsys, "evaluate", llama, "--data", f"b=lm-eval:{at}", "--batch-size", 4,
        "--seed", 3, "--json",
    )  # fmt: skip
    assert code == 0, err
    # nothing of the harness, of its bars, or of the task's own code
    assert err == f"lm-eval:{at}: 20 examples, the score is {score} (lm-eval {version()})\n"
    found = json.loads(out)["b"]
    assert found["benchmark"]["metric"] == score
    assert found["benchmark"]["examples"] == 20
    name = score.removeprefix("minus ")
    assert expected[name] not in (0.0, 1.0)
    assert found[name] == expected[name]
    assert found["score"] == (expected[name] if name == score else -expected[name])


def version() -> str:
    return benchmark_files.harness_version("a")


def test_what_is_scored_is_stated(
    llama: Path, folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = typed(
        capsys, "evaluate", llama, "--data", f"lm-eval:{folder}/choice.yaml", "--data", texts,
        "--benchmark-limit", 7,
    )  # fmt: skip
    assert code == 0, err
    header, scored, rows, stated = out.splitlines()
    assert header.split() == ["task", "loss", "perplexity", "score"]
    assert scored.split()[:3] == ["choice", "–", "–"]
    assert rows.startswith("texts")
    assert stated == (
        f"choice: the score is acc of ends, version 2.0, on 7 examples (lm-eval {version()})"
    )


def test_a_benchmark_leaves_no_trace_in_training(
    llama: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"penalty": "none", "epochs": 2, "batch_size": 4, "task": "new"}
    tests = {f: f"lm-eval:{folder}/{f}.yaml" for f in ("choice", "spoken")}
    state = random.getstate(), np.random.get_state()[1].tolist()
    alone = finetune(llama, texts, output_dir=tmp_path / "alone", **options)
    measured = finetune(
        llama, texts, output_dir=tmp_path / "measured", evaluate=tests, evaluate_every=2, **options
    )
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    weights = [read_ledger(Path(r["checkpoint"]) / "fisher/fisher.json").weights
               for r in (alone, measured)]  # fmt: skip
    assert weights[0] == weights[1]
    assert set(measured["metrics"]) == {
        *("before", "after", "epoch 1", "epoch 2"),
        *(f"step {step}" for step in (2, 4, 6, 8)),
    }
    after = evaluate(tmp_path / "measured", tests, batch_size=4)
    for name in tests:
        found = {key: value for key, value in after[name].items() if key != "benchmark"}
        assert measured["metrics"]["after"][name] == found
        assert measured["benchmarks"][name] == after[name]["benchmark"]


def test_a_model_is_given_back_as_it_was(llama: Path, folder: Path) -> None:
    model = load(open_checkpoint(llama))
    model.module.train()
    model.module.model.layers[0].eval()
    modes = [module.training for module in model.module.modules()]
    tokenizer = json.dumps(model.processor.init_kwargs, default=str), model.processor.pad_token
    state = torch.get_rng_state()
    seen: list[int] = []
    benchmark = open_benchmark(f"lm-eval:{folder}/spoken.yaml", limit=None, seed=0)
    first = benchmark.measure(model, batch_size=3, progress=seen.append)
    assert [module.training for module in model.module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    now = json.dumps(model.processor.init_kwargs, default=str), model.processor.pad_token
    assert now == tokenizer
    assert sum(seen) == len(benchmark) == 20
    assert len(seen) == 7
    assert benchmark.measure(model, batch_size=3) == first


def test_gate_matrix_and_report_count_a_benchmark(
    llama: Path, folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text("\n".join(json.dumps({"text": f"{i} {i + 1} {i + 2}"}) for i in range(32)))
    start = tmp_path / "start"
    fast: dict[str, Any] = {"learning_rate": 0.01, "epochs": 8, "fisher_estimator": "empirical"}
    finetune(llama, texts, task="old", output_dir=start, penalty="none", **fast)
    out, test = tmp_path / "out", f"lm-eval:{folder}/likely.yaml"
    words = (
        "finetune", start, "--data", new, "--task", "new", "--output-dir", out, "--ewc-lambda", 0,
        "--learning-rate", 0.01, "--epochs", 8, "--evaluate", f"bench={test}",
    )  # fmt: skip
    code, _, err = typed(capsys, *words, "--max-forgetting", 0)
    assert code == 5
    assert "forgot too much: bench lost" in err
    code, text, err = typed(capsys, *words, "--json")
    assert code == 0, err
    result = json.loads(text)
    before, after = (result["metrics"][when]["bench"]["score"] for when in ("before", "after"))
    assert after < before
    ledger = read_ledger(out / "fisher" / "fisher.json")
    record = (ledger.tasks[-1].benchmarks or {})["bench"]
    assert (record.task, record.version, record.harness) == ("likely", "2.0", version())
    assert ledger.tasks[0].benchmarks is None
    summary = show(out)
    assert summary["version"] == 2
    matrix = summary["accuracy_matrix"]
    assert matrix["benchmarks"] == {"bench": [None, before, after]}
    assert matrix["forgetting"] == {"value": before - after, "terms": 1, "of": 2}
    _, text, _ = typed(capsys, "show", out)
    assert ["after", "\\", "on", "old", "new", "bench"] in map(str.split, text.splitlines())
    assert "bench: the score is minus perplexity of likely, version 2.0, on 20 exam" in text
    code, _, err = typed(capsys, "report", out, "--output", tmp_path / "r.html")
    assert code == 0, err
    page = (tmp_path / "r.html").read_text()
    assert "on bench" in page
    assert "bench: the score is minus perplexity of likely" in page
    metrics = tmp_path / "metrics.json"
    code, _, err = typed(capsys, *words, "--metrics", metrics)
    assert code == 0, err
    numbers = json.loads(metrics.read_text())
    assert numbers["bench.forgetting"] == before - after
    assert numbers["bench.perplexity"] == -after


def test_a_benchmark_named_after_a_task_is_in_its_column(
    llama: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    test = {"new": f"lm-eval:{folder}/choice.yaml"}
    result = finetune(
        llama, texts, task="new", output_dir=tmp_path / "out", penalty="none", evaluate=test
    )
    matrix = show(tmp_path / "out")["accuracy_matrix"]
    score = result["metrics"]["after"]["new"]["score"]
    assert (matrix["scores"], matrix["benchmarks"]) == ([[score]], {})
    with pytest.raises(UsageError, match="needs old tasks"):  # none but the new one
        finetune(
            llama, texts, task="new", output_dir=tmp_path / "b", penalty="none", evaluate=test,
            max_forgetting=0.1,
        )  # fmt: skip


def test_up_to_date_until_a_file_changes(
    llama: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    def again(**options: Any) -> str:
        result = finetune(
            llama, texts, task="new", output_dir=tmp_path / "out", penalty="none", max_steps=1,
            evaluate={"b": f"lm-eval:{folder}/spoken.yaml"}, overwrite=True, **options,
        )  # fmt: skip
        return str(result["status"])

    assert again() == "done"
    assert again() == "cached"
    assert again(benchmark_limit=3) == "done"
    assert again(benchmark_limit=3) == "cached"
    for name in ("spoken.py", "choice.yaml", "ends.jsonl", "spoken.yaml"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        assert again(benchmark_limit=3) == "done", name


def test_the_digest_of_its_data_can_be_left_out(
    llama: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    tests = {"b": f"lm-eval:{folder}/choice.yaml"}
    for data_digest in (True, False):
        out = tmp_path / f"out-{data_digest}"
        result = finetune(
            llama, texts, output_dir=out, penalty="none", max_steps=1, evaluate=tests,
            data_digest=data_digest, benchmark_limit=2,
        )  # fmt: skip
        expected = benchmark_content(tests["b"])["digest"] if data_digest else None
        assert result["benchmarks"]["b"]["digest"] == expected
        card = " ".join((out / "README.md").read_text().split())
        assert ("a digest of the data of texts, the benchmark b, which" in card) == data_digest
        assert ("The ledger has no digest of any data." in card) != data_digest


def test_a_chain_is_evaluated_on_a_benchmark(
    llama: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    run_file = tmp_path / "tasks.toml"
    run_file.write_text(f"""
start = "{llama.name}"
output-dir = "chain"
[evaluate]
bench = "lm-eval:tasks/choice.yaml"
[defaults]
max-steps = 1
ewc-lambda = 1
benchmark-limit = 5
[[task]]
name = "a"
data = "{texts.name}"
[[task]]
name = "b"
data = "{texts.name}"
""")
    result = run(run_file)
    assert result["accuracy_matrix"] is not None
    assert len(result["accuracy_matrix"]["benchmarks"]["bench"]) == 3
    assert {step["status"] for step in run(run_file)["steps"]} == {"skipped"}
    (folder / "ends.jsonl").write_text((folder / "ends.jsonl").read_text() + "\n")
    first = run(run_file, dry_run=True)["steps"][0]
    assert first["reason"] == "changed: test data of bench"
    run_file.write_text(run_file.read_text().replace("choice.yaml", "lost.yaml"))
    with pytest.raises(
        InputError, match=r"\[evaluate\], bench: lm-eval:.*lost.yaml does not exist"
    ):
        run(run_file, dry_run=True)


def test_several_processes_share_the_examples(
    llama: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        "finetune", str(llama), "--data", str(texts), "--task", "new", "--output-dir", str(out),
        "--penalty", "none", "--max-steps", "1", "--learning-rate", "1e-9", "--json",
        "--evaluate", f"c=lm-eval:{folder}/choice.yaml",
        "--evaluate", f"s=lm-eval:{folder}/spoken.yaml",
    ]  # fmt: skip
    log = tmp_path / "log"
    assert together.ended(together.started(2, words, log)) == [0, 0], log.read_text()
    before = read_ledger(out / "fisher" / "fisher.json").tasks[-1].metrics["before"]
    tests = {"c": f"lm-eval:{folder}/choice.yaml", "s": f"lm-eval:{folder}/spoken.yaml"}
    alone = evaluate(llama, tests)
    for name in tests:
        assert before[name]["score"] == pytest.approx(alone[name]["score"], abs=1e-12)


def test_a_classifier_is_refused(folder: Path, tmp_path: Path) -> None:
    kind = transformers.BertForSequenceClassification
    bert = save(tmp_path / "bert", kind, bert_config(), word_tokenizer())
    with pytest.raises(UsageError, match=r"needs a language model .* for sequence-classification"):
        evaluate(bert, f"lm-eval:{folder}/choice.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_split": "none"}, "fails with KeyError"),
        ({"metric_list": []}, "higher_is_better is not known for any metric"),
        ({"dataset_kwargs": {"data_files": "x.jsonl"}}, "data_files: x.jsonl does not exist"),
        (
            {"dataset_kwargs": {"data_files": "/**/x.jsonl"}},
            r"data_files: /\*\*.* searches folders outside",
        ),
        ({"dataset_kwargs": {"data_files": ["a/../../**"]}}, r"data_files: a/\.\./.* searches"),
        ({"output_type": "talk"}, "fails with .*talk"),
        ({"group": "g"}, "is a group, which lm-eval reads by name alone"),
    ],
)
def test_a_task_file_that_does_not_work(
    llama: Path, folder: Path, change: Any, message: str
) -> None:
    file = write(folder / "bad.yaml", CHOICE | change)
    with pytest.raises(InputError, match=message) as refused:
        evaluate(llama, f"lm-eval:{file}")
    assert "\n" not in str(refused.value)


def own_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own tasks are thousands, which take seconds to read; here they are few."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(benchmarks, "_all_tasks", lambda: index)


def test_what_a_task_file_includes_is_no_task_of_its_own(folder: Path) -> None:
    write(folder / "_base.yaml", {key: value for key, value in CHOICE.items() if key != "task"})
    (folder / "child.yaml").write_text("include: _base.yaml\ntask: child")
    before = benchmark_files.task_file_digest(folder / "child.yaml")
    (folder / "_base.yaml").write_text("output_type: loglikelihood")
    assert benchmark_files.task_file_digest(folder / "child.yaml") != before


def test_files_that_are_none(llama: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.yaml").write_text("task: [a\nb: c")
    (folder / "loop.yaml").write_text("task: a\ninclude: loop.yaml")
    (folder / "nul.yaml").write_text('task: a\ninclude: "x\\0y"')
    (folder / "list.yaml").write_text("- a\n- b")
    (folder / "tasks.toml").write_text(f'data = "lm-eval:{folder}/choice.yaml"')
    for name, code, message in (
        ("choise.yaml", 3, "choise.yaml does not exist; did you mean choice.yaml"),
        ("broken.yaml", 3, "broken.yaml, line 2 is not valid YAML"),
        ("loop.yaml", 3, "loop.yaml includes itself"),
        ("nul.yaml", 3, "include: expected the name of a file, found a NUL in it"),
        ("list.yaml", 3, "list.yaml is not a task of lm-eval: expected the key task"),
    ):
        words = ("evaluate", llama, "--data", f"lm-eval:{folder}/{name}")
        found, _, err = typed(capsys, *words)
        assert (found, message in err, err.count("\n")) == (code, True, 1), err
    code, _, err = typed(
        capsys, "evaluate", llama, "--data", f"lm-eval:{folder}/choice.yaml",
        "--benchmark-limit", 0,
    )  # fmt: skip
    assert (code, err) == (2, "error: --benchmark-limit 0: expected at least 1\n")
    for data in (f"lm-eval:{folder}/choice.yaml", folder / "tasks.toml"):
        code, _, err = typed(capsys, "fisher", llama, "--data", data)
        assert code == 2
        assert "is a benchmark, which is only for evaluation" in err


def test_options_that_cannot_be_combined(llama: Path, folder: Path, texts: Path) -> None:
    test = {"b": f"lm-eval:{folder}/choice.yaml"}
    options: dict[str, Any] = {"output_dir": llama.parent / "out"}
    with pytest.raises(UsageError, match="--shard cannot run a benchmark"):
        finetune(llama, texts, evaluate=test, shard=True, penalty="none", **options)
    fisher(llama, texts, task="b", estimator="empirical")
    with pytest.raises(UsageError, match=r"--validation b=lm-eval:.*chosen on rows"):
        finetune(llama, texts, task="n", ewc_lambda="auto", validation=test, **options)


def test_tasks_of_the_harness_by_name(
    llama: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("one", "two"):
        write(folder / f"{name}.yaml", CHOICE | {"task": name, "tag": "both"})
    group = {"group": "all", "task": ["one", "two"], "metadata": {"version": 4}}
    aggregate = [{"metric": "acc_norm", "weight_by_size": True}, {"metric": "acc"}]
    write(folder / "all.yaml", group | {"aggregate_metric_list": aggregate})
    write(folder / "rest.yaml", group | {"group": "rest"})
    own_index(folder, monkeypatch)
    assert benchmark_content("lm-eval:one") == {"harness": version(), "task": "one"}
    found = evaluate(llama, {"a": "lm-eval:one", "b": "lm-eval:all"}, benchmark_limit=9)
    assert found["b"]["score"] == found["a"]["acc_norm"]
    group_record: Any = found["b"]["benchmark"]
    assert (group_record["metric"], group_record["examples"]) == ("acc_norm", 18)
    assert (group_record["task"], group_record["version"]) == ("all", "4")
    with pytest.raises(InputError, match=r"has no task 'on'; did you mean one\?"):
        evaluate(llama, "lm-eval:on")
    with pytest.raises(InputError, match="several tasks: name one of one, two"):
        evaluate(llama, "lm-eval:both")
    with pytest.raises(InputError, match=r"a group without an aggregate.* \(one, two\)"):
        evaluate(llama, "lm-eval:rest")


def test_data_that_the_hub_would_have(
    llama: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = {"dataset_path": "somebody/ends", "dataset_kwargs": None}
    file = write(folder / "far.yaml", {k: v for k, v in (CHOICE | far).items() if v is not None})
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be reached.*: name a local task file"):
        evaluate(llama, f"lm-eval:{file}")


def test_the_harness_is_an_extra(
    llama: Path, folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise benchmark_files.PackageNotFoundError(name)

    monkeypatch.setattr(benchmark_files, "version", missing)
    test = f"lm-eval:{folder}/choice.yaml"
    for command in (
        lambda: evaluate(llama, test),
        lambda: finetune(
            llama, texts, output_dir=folder / "out", penalty="none", evaluate={"b": test}
        ),
    ):
        with pytest.raises(UsageError, match=r"needs lm_eval: pip install 'consolidate-ewc\[lm-ev"):
            command()
