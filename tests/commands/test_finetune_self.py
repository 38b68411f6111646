"""`finetune --protect-self` leaves what `fisher --generate` and `finetune` leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

import consolidate
from consolidate.chain import resume
from consolidate.commands import fisher as fisher_command
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from support import tiny_models
from support.checkpoints import Write
from support.faults import Killed, break_off, kill_after
from support.folders import contents
from support.networks import FAST
from support.together import ended, started

COMMON: dict[str, Any] = {"batch_size": 2, "seed": 3, "save_every_minutes": 0}
TRAINED: dict[str, Any] = {"ewc_lambda": 10.0, "max_steps": 3, "task": "new", "learning_rate": 1e-3}


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    config = tiny_models.gpt2_config(bos_token_id=0, eos_token_id=0)
    tokenizer = tiny_models.byte_tokenizer()
    return tiny_models.save(tmp_path / "gpt2", transformers.GPT2LMHeadModel, config, tokenizer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in tiny_models.CORPUS))
    return path


def written(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for the digest of what the task was made from.

    That of one command knows no Fisher, as it is known before one is measured.
    """
    found = contents(folder)
    ledger = json.loads(found["fisher/fisher.json"])
    assert ledger["tasks"][-1].pop("made_from")
    return {**found, "fisher/fisher.json": json.dumps(ledger).encode()}


def in_two_commands(start: Path, data: Path, out: Path, **options: Any) -> dict[str, bytes]:
    copy = start.with_name("copy")
    shutil.copytree(start, copy)
    measured = {name: options[name] for name in ("structure", "freeze") if name in options}
    consolidate.fisher(copy, generate=4, **COMMON, **measured)
    consolidate.finetune(copy, data, output_dir=out, **COMMON, **{**TRAINED, **options})
    return written(out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structure": "inputs", "merge_rule": "separate", "evaluate": {"new": "new.jsonl"}},
        {"lora_rank": 2, "freeze": ["transformer.wpe*"], "interpolate": 0.5},
    ],
)
def test_one_command_leaves_what_two_leave(
    gpt2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = in_two_commands(gpt2, data, tmp_path / "two", **options)
    given = {**COMMON, **TRAINED, **options, "protect_self": 4}
    result = consolidate.finetune(gpt2, data, output_dir=tmp_path / "one", **given)
    assert written(tmp_path / "one") == expected
    assert result["penalty_value"] > 0
    first, second = read_fisher(tmp_path / "one" / "fisher").ledger.tasks
    assert (first.name, second.name) == ("self", "new")
    assert first.generated is not None
    assert (first.generated.sequences, first.generated.seed) == (4, 3)
    assert consolidate.verify(tmp_path / "one")["tasks"] == ["self", "new"]
    assert not (gpt2 / "fisher").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".one")]
    monkeypatch.delattr(fisher_command, "generate_sample")  # it is told without measuring
    again = consolidate.finetune(gpt2, data, output_dir=tmp_path / "one", **given)
    assert (again["status"], again["metrics"]) == ("cached", result["metrics"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".one")]


def test_float16_weights_are_measured_in_float32(gpt2: Path, data: Path, tmp_path: Path) -> None:
    weights = load_file(gpt2 / "model.safetensors")
    narrow = {name: values.half() for name, values in weights.items()}
    save_file(narrow, gpt2 / "model.safetensors", {"format": "pt"})
    expected = in_two_commands(gpt2, data, tmp_path / "two")
    given = {**COMMON, **TRAINED, "protect_self": 4}
    consolidate.finetune(gpt2, data, output_dir=tmp_path / "one", **given)
    assert written(tmp_path / "one") == expected


def test_another_number_of_texts_is_another_result(gpt2: Path, data: Path, tmp_path: Path) -> None:
    given = {**COMMON, **TRAINED, "output_dir": tmp_path / "out", "overwrite": True}
    found = [consolidate.finetune(gpt2, data, protect_self=n, **given) for n in (2, 3, 3)]
    assert [one["status"] for one in found] == ["done", "done", "cached"]


def test_the_texts_are_saved(
    gpt2: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "consolidate")
    texts, expected = tmp_path / "texts.jsonl", tmp_path / "expected.jsonl"
    copy = shutil.copytree(gpt2, tmp_path / "copy")
    consolidate.fisher(copy, generate=4, save_generated=expected, **COMMON)
    given = {**COMMON, **TRAINED, "protect_self": 4, "output_dir": tmp_path / "out"}
    texts.write_text("mine\n")
    with pytest.raises(InputError, match=r"texts\.jsonl already exists, with other content"):
        consolidate.finetune(gpt2, data, save_generated=texts, **given)
    assert texts.read_text() == "mine\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]
    texts.unlink()
    consolidate.finetune(gpt2, data, save_generated=texts, **given)
    assert texts.read_bytes() == expected.read_bytes()
    texts.unlink()
    again = consolidate.finetune(gpt2, data, save_generated=texts, **given)
    assert (again["status"], texts.exists()) == ("cached", False)
    assert "--save-generated: no text is generated, as " in caplog.text


def test_texts_that_are_gone_are_generated_again_where_the_training_was_killed(
    gpt2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.jsonl"
    given = {**COMMON, **TRAINED, "protect_self": 4, "save_generated": texts}
    break_off(monkeypatch, 2)
    with pytest.raises(Killed):
        consolidate.finetune(gpt2, data, output_dir=tmp_path / "out", **given)
    found = texts.read_bytes()
    texts.unlink()
    consolidate.finetune(gpt2, data, output_dir=tmp_path / "out", **given)
    assert texts.read_bytes() == found


def test_a_dry_run_generates_nothing(
    gpt2: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "consolidate")
    monkeypatch.delattr(fisher_command, "generate_sample")
    texts = tmp_path / "texts.jsonl"
    given = {**COMMON, **TRAINED, "protect_self": 4, "dry_run": True, "save_generated": texts}
    for told in (False, True):
        before = contents(tmp_path)
        found = consolidate.finetune(gpt2, data, output_dir=tmp_path / "out", **given)
        assert (found["old_tasks"], found["penalty"], found["steps"]) == (["self"], "ewc", 3)
        assert contents(tmp_path) == before
        assert (f"up to date: {texts} already exists, with other content" in caplog.text) == told
        texts.write_text("mine\n")


@pytest.mark.slow
def test_two_processes_leave_what_they_leave_in_two_commands(
    gpt2: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(gpt2, tmp_path / "copy")
    train = f"--data {data} --task new --ewc-lambda 10 --max-steps 3"
    log = tmp_path / "log"
    for words in (
        f"fisher {tmp_path}/copy --generate 4",
        f"finetune {tmp_path}/copy --output-dir {tmp_path}/two {train}",
        f"finetune {gpt2} --output-dir {tmp_path}/one {train} --protect-self 4",
    ):
        words += " --batch-size 2 --seed 3 --device cpu"
        assert ended(started(2, words.split(), log)) == [0, 0], log.read_text()
    assert written(tmp_path / "one") == written(tmp_path / "two")


def test_killed_anywhere_it_resumes(
    gpt2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = in_two_commands(gpt2, data, tmp_path / "two")

    def run() -> Any:
        return consolidate.finetune(
            gpt2, data, output_dir=tmp_path / "one", protect_self=4, **COMMON, **TRAINED
        )

    whole = resume.KeptWork.keep
    with monkeypatch.context() as patch:  # while texts are generated

        def keep(self: Any, *arguments: Any, **options: Any) -> None:
            whole(self, *arguments, **options)
            raise Killed

        patch.setattr(resume.KeptWork, "keep", keep)
        with pytest.raises(Killed):
            run()
    assert (tmp_path / "..one.measured.consolidate-partial").exists()
    kill_after(monkeypatch, 2)  # in the pass
    with pytest.raises(Killed):
        run()
    break_off(monkeypatch, 2)
    with pytest.raises(Killed):
        run()
    assert (tmp_path / ".one.measured" / "fisher.json").is_file()
    assert not (tmp_path / "one").exists()
    before = contents(tmp_path)
    other = {**COMMON, **TRAINED, "protect_self": 5}
    with pytest.raises(InputError, match="began with another measurement of self: start that comm"):
        consolidate.finetune(gpt2, data, output_dir=tmp_path / "one", **other)
    assert contents(tmp_path) == before
    monkeypatch.delattr(fisher_command, "generate_sample")  # it was measured before the last kill
    run()
    assert written(tmp_path / "one") == expected
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "none", "ewc_lambda": None}, "--protect-self cannot be combined with --penal"),
        ({"penalty": "l2"}, "--protect-self cannot be combined with --penalty l2"),
        ({"fisher": "elsewhere"}, "--protect-self cannot be combined with --fisher"),
        ({"protect_self": 0}, "--protect-self 0: expected at least 1"),
        ({"shard": True}, "--shard"),
        ({"task": "self"}, "--protect-self names its own task 'self'"),
        ({"protect_self": None, "save_generated": "t"}, "--save-generated needs --protect-self"),
    ],
)
def test_what_contradicts_it(
    gpt2: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"protect_self": 4, **COMMON, **TRAINED, **options}
    with pytest.raises(UsageError, match=message):
        consolidate.finetune(gpt2, data, output_dir=tmp_path / "out", **given)


def test_a_model_with_a_fisher_or_without_texts_is_refused(
    gpt2: Path, data: Path, network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    given = {"ewc_lambda": 1.0, "protect_self": 4}
    message = (
        r"--generate needs a causal language model of trans.*own.*\n--protect-self 4 measures "
    )
    message += "as `consolidate fisher .*start --generate 4` does, which has these options"
    with pytest.raises(InputError, match=r"holds no Fisher: .* or measure it on texts it gen"):
        consolidate.finetune(gpt2, data, output_dir=tmp_path / "out", ewc_lambda=1.0)
    with pytest.raises(UsageError, match=message):
        consolidate.finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "out", **given, **FAST
        )
    consolidate.fisher(gpt2, data, task="old")
    with pytest.raises(InputError, match=r"has a Fisher, of old, .* leave --protect-self out"):
        consolidate.finetune(gpt2, data, output_dir=tmp_path / "out", **given)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def test_what_would_be_refused_after_the_measurement_is_refused_before_it(
    gpt2: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + '{"text": "more"}\n')
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "mine").write_text("mine")
    consolidate.finetune(
        gpt2, data, output_dir=tmp_path / "trained", penalty="none", **COMMON, max_steps=1
    )
    bare = shutil.copytree(gpt2, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    consolidate.finetune(
        gpt2, data, output_dir=tmp_path / "itself", protect_self=2, **COMMON, **TRAINED
    )
    before = contents(tmp_path)
    for options, message in (
        ({"evaluate": {"self": tmp_path / "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
        ({"head": "new"}, "--head new cannot be combined with the objective causal-lm"),
        ({"max_length": 10**6}, "--max-length: expected at most"),
        ({"checkpoint": bare}, "expected a tokenizer, found none"),
        ({"output_dir": tmp_path / "itself"}, "itself is not empty"),
        ({"validation": {"old": other}, "ewc_lambda": "auto"}, "--validation old: expected the ne"),
        ({"validation": {"self": data}, "ewc_lambda": "auto"}, "cannot be chosen on training or"),
        ({"max_forgetting": 0.1}, "--max-forgetting"),
        ({"structure": "inputs", "penalty_step": "proximal"}, "--penalty-step proximal cannot"),
        ({"output_dir": tmp_path / "occupied"}, "occupied is not empty"),
        ({"output_dir": tmp_path / "trained"}, "trained is not empty"),
        ({"save_generated": tmp_path / "out" / "t"}, "name a file outside of it"),
    ):
        given = {"checkpoint": gpt2, "output_dir": tmp_path / "out", "protect_self": 4}
        with pytest.raises((InputError, UsageError), match=message):
            consolidate.finetune(data=data, **{**COMMON, **TRAINED, **given, **options})
        assert contents(tmp_path) == before


def test_it_chooses_by_held_out_rows_of_what_it_measures(
    gpt2: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "rain falls on the hills"}\n{"text": "more rain"}\n')
    given = {**COMMON, **TRAINED, "ewc_lambda": [1.0, 10.0], "validation": {"self": other}}
    result = consolidate.finetune(
        gpt2, data, output_dir=tmp_path / "out", protect_self=4, max_forgetting=0.5, **given
    )
    assert list(result["metrics"]["after"]) == ["self"]
    assert len(result["lambda_search"]["trials"]) == 2
