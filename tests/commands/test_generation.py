"""`fisher --generate`: a Fisher without data, against an enumeration of all texts."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import consolidate
from consolidate.chain import resume
from consolidate.commands import fisher as fisher_command
from consolidate.commands import generation as generation_command
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.models.loading import load_model
from consolidate.views.card import model_card
from consolidate.views.card_text import Subject
from formats.checkpoint import open_checkpoint
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_folder import read_fisher
from formats.fisher_json import Generated
from formats.rows import file_digest
from support import loopback_hub, tiny_models
from support.command_line import run
from support.faults import Killed, kill_after
from support.folders import contents
from support.loopback_hub import TOKEN, Hub
from support.networks import NETWORK
from support.tiny_models import change_config
from support.together import ended, started

LENGTH = 3
END = 1
FEW: dict[str, Any] = {"generate": 6, "max_length": 8, "batch_size": 2}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Four tokens, of which 0 begins and 1 ends a text; in float64, without a tokenizer."""
    config = transformers.GPT2Config(
        vocab_size=4, n_embd=4, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=END
    )
    folder = tmp_path / "tiny"
    tiny_models.save(folder, transformers.GPT2LMHeadModel, config, dtype=torch.float64)
    module = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 4
    module.save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    config = tiny_models.gpt2_config(bos_token_id=0, eos_token_id=0)
    tokenizer = tiny_models.byte_tokenizer()
    return tiny_models.save(tmp_path / "gpt2", transformers.GPT2LMHeadModel, config, tokenizer)


def every_text(begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """All texts of at most three tokens, which end with the end token."""
    if len(begun) == LENGTH or begun[-1:] == (END,):
        yield begun
    else:
        for token in range(4):
            yield from every_text((*begun, token))


def enumerated(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """E[s²] and the variance of s² by parameter, s = ∇ log p of a text, and E of the tokens."""
    module = load_model(open_checkpoint(folder)).module
    parameters = dict(module.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    tokens = total = 0.0
    for text in every_text():
        ids = torch.tensor([[0, *text]])
        each = module(ids).logits[0, :-1].log_softmax(-1)
        log_p = each.gather(1, ids[0, 1:, None]).sum()
        p = float(log_p.detach().exp())
        for name, g in zip(
            parameters, torch.autograd.grad(log_p, [*parameters.values()]), strict=True
        ):
            first[name] += p * g**2
            second[name] += p * g**4
        tokens += p * len(text)
        total += p
    assert total == pytest.approx(1, abs=1e-12)
    return first, {n: second[n] - first[n] ** 2 for n in first}, tokens


def measured(folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The Fisher in float64 before it is stored, and the ledger's record."""
    found: dict[str, FisherDiagonal] = {}
    real = fisher_command.of_own_labels

    def noted(*arguments: Any, **more: Any) -> FisherDiagonal:
        found["fisher"] = real(*arguments, **more)
        return found["fisher"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher_command, "of_own_labels", noted)
        consolidate.fisher(folder, **options, accumulate_dtype="float64", overwrite=True)
    return dict(found["fisher"]), read_fisher(folder / "fisher").ledger.tasks[-1]


OTHER_LABELS: dict[str, dict[str, Any]] = {
    "own labels": {},
    "labels sampled again": {"estimator": "mc", "mc_samples": 2},
    "all labels": {"estimator": "exact"},
}


@pytest.mark.parametrize("labels", OTHER_LABELS)
def test_it_is_unbiased(tiny: Path, labels: str) -> None:
    expected, variance, tokens = enumerated(tiny)
    count, errors = 1500, []
    options = {"generate": count, "max_length": LENGTH, "batch_size": 300}
    fisher, task = measured(tiny, **options, **OTHER_LABELS[labels])
    for name, values in fisher.items():
        # E[s²] of each weight; no weight is without noise but where s is 0
        means, error = values * task.units / count, (variance[name] / count).sqrt()
        assert ((means - expected[name]).abs() <= 4.5 * error + 1e-12).all(), name
        errors.append((means.sum() - expected[name].sum()) / expected[name].sum())
    assert max(map(abs, errors)) < 0.2
    assert abs(task.units / count / tokens - 1) < 0.05
    assert task.estimator == ("exact" if labels == "all labels" else "mc")
    assert task.mc_samples == {"own labels": 1, "labels sampled again": 2}.get(labels)
    assert task.generated.label_draws == (2 if labels == "labels sampled again" else None)


def test_more_texts_bring_it_nearer(tiny: Path) -> None:
    expected, _, tokens = enumerated(tiny)

    def distance(count: int) -> float:
        fisher, _ = measured(tiny, generate=count, max_length=LENGTH, batch_size=500, seed=4)
        parts = [(fisher[name] - expected[name] / tokens).flatten() for name in fisher]
        return float(torch.cat(parts).norm())

    assert distance(2000) < 0.5 * distance(60)


def test_changed_sampling_draws_labels_again(tiny: Path) -> None:
    options = {"generate": 50, "max_length": LENGTH}
    for more in ({"temperature": 0.7}, {"top_p": 0.8}):
        _, task = measured(tiny, **options, **more)
        assert (task.estimator, task.mc_samples, task.generated.label_draws) == ("mc", 1, 1)
    own, _ = measured(tiny, **options)
    again, _ = measured(tiny, **options, estimator="mc")
    assert any(not torch.equal(own[name], again[name]) for name in own)


def test_the_ledger_says_how(gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\nrain\n")
    texts = tmp_path / "texts.jsonl"
    code, out, err = run(
        capsys, "fisher", gpt2, "--generate", 5, "--max-length", 7, "--prompts", prompts,
        "--top-p", 0.9, "--seed", 3, "--batch-size", 2, "--save-generated", texts, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    (task,) = read_fisher(gpt2 / "fisher").ledger.tasks
    assert (task.name, task.data, task.data_digest) == ("self", "prompts.txt", None)
    assert (task.unit, task.examples, task.max_length) == ("token", 5, None)
    expected = Generated(5, 7, 1.0, 0.9, 3, file_digest(prompts), 1, 2, 0, file_digest(texts))
    assert task.generated == expected
    assert result["generated"] == vars(expected)
    assert (result["loss_on"], result["max_length"]) == ("completion", 7)
    assert "generated 5 texts, " in err
    assert "another batch size would change at most about " in err
    text = "5 generated texts, max length 7, with prompts, top-p 0.9"
    assert text in run(capsys, "show", gpt2)[1]
    shown = json.loads(run(capsys, "show", gpt2, "--json")[1])
    assert shown["tasks"][0]["generated"] == vars(expected)
    assert "measured on texts that the model generated: self" in run(capsys, "verify", gpt2)[1]
    assert json.loads(run(capsys, "verify", gpt2, "--json")[1])["generated"] == ["self"]
    run(capsys, "report", gpt2, "--output", tmp_path / "page.html")
    assert text in (tmp_path / "page.html").read_text()
    ledger = read_fisher(gpt2 / "fisher").ledger
    card = model_card(None, ledger, Subject("user/model", {"model_type": "gpt2"}))
    assert text in card
    assert "generated itself from prompts, and on no other data: it follows from the" in card
    assert "a digest of the data of the prompts of self, which can confirm a guess" in card


def test_no_digest_of_prompts_without_digests(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("rain\n")
    consolidate.fisher(gpt2, **FEW, prompts=tmp_path / "p", data_digest=False)
    (task,) = read_fisher(gpt2 / "fisher").ledger.tasks
    assert (task.generated.prompts, task.generated.texts, task.made_from) == (None, None, None)
    assert "texts" not in json.loads((gpt2 / "fisher/fisher.json").read_text())["tasks"][0]


def test_it_is_up_to_date_or_not(gpt2: Path, tmp_path: Path) -> None:
    prompts, texts = tmp_path / "p.txt", tmp_path / "texts.jsonl"
    prompts.write_text("rain\n")
    options = {**FEW, "prompts": prompts, "overwrite": True}

    def status(**more: Any) -> str:
        return str(consolidate.fisher(gpt2, **{**options, **more})["status"])

    assert [status(), status(), status(generate=7), status(generate=7)] == [
        "done", "cached", "done", "cached",
    ]  # fmt: skip
    assert status(generate=7, temperature=0.5) == "done"
    prompts.write_text("again\n")
    assert [status(), status()] == ["done", "cached"]
    assert [status(save_generated=texts), status(save_generated=texts)] == ["done", "cached"]
    assert len(texts.read_text().splitlines()) == 6


def test_a_dry_run_with_texts_to_write_says_what_would_be_refused(
    gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    consolidate.fisher(gpt2, **FEW)
    with caplog.at_level("INFO"):
        consolidate.fisher(gpt2, **FEW, save_generated=tmp_path / "texts.jsonl", dry_run=True)
    assert "fisher already exists" in caplog.text


def test_other_texts_in_the_file_are_noticed_where_all_is_up_to_date(
    gpt2: Path, tmp_path: Path
) -> None:
    texts, options = tmp_path / "texts.jsonl", {**FEW, "save_generated": tmp_path / "texts.jsonl"}
    consolidate.fisher(gpt2, **options)
    written, fisher = texts.read_text(), contents(gpt2)
    assert consolidate.fisher(gpt2, **options)["status"] == "cached"
    texts.write_text("mine\n")
    with pytest.raises(InputError, match=r"texts\.jsonl already exists, with other content"):
        consolidate.fisher(gpt2, **options)
    assert (texts.read_text(), contents(gpt2)) == ("mine\n", fisher)
    assert consolidate.fisher(gpt2, **options, overwrite=True)["status"] == "done"
    assert (texts.read_text(), contents(gpt2)) == (written, fisher)


def test_texts_need_a_tokenizer_only_to_be_saved(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"t\.jsonl: .*tiny has no tokenizer"):
        consolidate.fisher(tiny, **FEW | {"max_length": 3}, save_generated=tmp_path / "t.jsonl")
    assert not (tiny / "fisher").exists()
    assert consolidate.fisher(tiny, **FEW | {"max_length": 3})["generated"]["texts"] is None


def test_texts_that_are_all_alike_tell_no_standard_error(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of one token begin with the same token, and its labels are summed over, not drawn."""
    words = ["fisher", tiny, "--generate", 5, "--max-length", 1, "--estimator", "exact"]
    _, out, _ = run(capsys, *words)
    assert "trace" in out
    assert "±" not in out
    _, out, _ = run(capsys, *words, "--max-length", 3, "--overwrite", "--json")
    assert max(layer["relative_error"] or 0 for layer in json.loads(out)["layers"].values()) > 0.01


def test_the_same_seed_gives_the_same_bytes(gpt2: Path, tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 2, "c": 6}
    for name, size in sizes.items():
        consolidate.fisher(
            gpt2,
            **{**FEW, "batch_size": size},
            output_dir=tmp_path / name,
            save_generated=tmp_path / f"{name}.jsonl",
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    texts = {(tmp_path / f"{name}.jsonl").read_bytes() for name in sizes}
    assert len(texts) == 1  # as for other batch sizes, up to rounding
    first, other = (read_fisher(tmp_path / name / "fisher").fisher for name in ("a", "c"))
    for name in first:
        torch.testing.assert_close(first[name], other[name], rtol=1e-4, atol=1e-8)
    consolidate.fisher(gpt2, **FEW, seed=1, output_dir=tmp_path / "d")
    assert contents(tmp_path / "a") != contents(tmp_path / "d")


@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_while_generating_it_resumes_to_the_same_bytes(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    consolidate.fisher(gpt2, **FEW, output_dir=tmp_path / "whole")
    real, batches, seen = generation_command.keep_texts, [0], list[int]()

    def killed(work: Any, written: Any, count: int) -> None:
        real(work, written, count)
        batches[0] += 1
        if batches[0] == after:
            raise Killed

    options = {**FEW, "output_dir": tmp_path / "out", "save_every_minutes": 0}
    monkeypatch.setattr(generation_command, "keep_texts", killed)
    with pytest.raises(Killed):
        consolidate.fisher(gpt2, **options)
    monkeypatch.setattr(
        generation_command,
        "keep_texts",
        lambda work, written, count: (seen.append(len(written.texts)), real(work, written, count)),
    )
    consolidate.fisher(gpt2, **options)
    assert seen == [4, 6][after - 1 :]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*partial*"))


def test_killed_in_the_pass_no_text_is_generated_again(
    gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("consolidate.estimation.compensated_sums.FOLDED_BATCHES", 2)
    consolidate.fisher(gpt2, **FEW, output_dir=tmp_path / "whole")
    options = {**FEW, "output_dir": tmp_path / "out", "save_every_minutes": 0}
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        consolidate.fisher(gpt2, **options)

    def refused(*arguments: Any, **more: Any) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(generation_command, "keep_texts", refused)
    with caplog.at_level("INFO", "consolidate"):
        consolidate.fisher(gpt2, **options)
    assert "resuming after 4 of 6 examples" in caplog.messages
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_saved_progress_of_other_texts_is_refused(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FEW, "output_dir": tmp_path / "out", "save_every_minutes": 0}
    kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        consolidate.fisher(gpt2, **options)
    with pytest.raises(InputError, match=r"another run \(changed: generate 6 → 7\)"):
        consolidate.fisher(gpt2, **{**options, "generate": 7})


def killed_after_texts(rounds: int) -> Any:
    """Let each process be killed once so many rounds of texts were generated, and maybe kept."""

    def prepare() -> None:
        real, seen = generation_command.keep_texts, [0]

        def keep(*arguments: Any) -> None:
            real(*arguments)
            seen[0] += 1
            if seen[0] == rounds:
                os.kill(os.getpid(), signal.SIGKILL)

        generation_command.keep_texts = keep

    return prepare


@pytest.mark.parametrize("rounds", [1, 2])
def test_several_processes_resume_to_the_same_bytes(
    gpt2: Path, tmp_path: Path, rounds: int
) -> None:
    words = ["fisher", str(gpt2), "--generate", "7", "--max-length", "8", "--batch-size", "2"]
    words += ["--save-every-minutes", "0", "--output-dir"]
    log = tmp_path / "log"
    assert ended(started(2, [*words, str(tmp_path / "whole")], log)) == [0, 0], log.read_text()
    broken = started(2, [*words, str(tmp_path / "out")], log, killed_after_texts(rounds))
    assert ended(broken) == [-signal.SIGKILL] * 2, log.read_text()
    assert not (tmp_path / "out").exists()
    assert ended(started(2, [*words, str(tmp_path / "out")], log)) == [0, 0], log.read_text()
    assert f"resuming after {[4, 7][rounds - 1]} of 7 generated texts" in log.read_text()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*partial*"))


def test_killed_while_the_texts_are_written_they_are_not_generated_again(
    gpt2: Path, tmp_path: Path
) -> None:
    texts, log = tmp_path / "texts.jsonl", tmp_path / "log"
    words = ["fisher", str(gpt2), "--generate", "5", "--max-length", "8", "--batch-size", "2"]
    words += ["--save-generated", str(texts), "--output-dir", str(tmp_path / "out")]

    def killed_before_renaming() -> None:
        real = os.rename

        def rename(source: Any, target: Any) -> None:
            if Path(target) == texts:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        os.rename = rename

    assert ended(started(1, words, log, killed_before_renaming)) == [-signal.SIGKILL]
    assert not texts.exists()
    assert list(tmp_path.glob(".texts.jsonl.*"))
    assert ended(started(1, words, log)) == [0], log.read_text()
    assert "resuming after 5 of 5 generated texts" in log.read_text()
    assert len(texts.read_text().splitlines()) == 5
    assert not list(tmp_path.glob(".texts.jsonl.*"))


def test_two_processes_give_what_one_gives(gpt2: Path, tmp_path: Path) -> None:
    words = ["fisher", str(gpt2), "--generate", "7", "--max-length", "8", "--batch-size", "2"]

    def made(name: str, count: int) -> tuple[Any, bytes]:
        texts = tmp_path / f"{name}.jsonl"
        more = ["--output-dir", str(tmp_path / name), "--save-generated", str(texts)]
        children = started(count, [*words, *more], tmp_path / "log")
        assert ended(children) == [0] * count, (tmp_path / "log").read_text()
        return read_fisher(tmp_path / name / "fisher"), texts.read_bytes()

    (one, texts), (two, others) = made("one", 1), made("two", 2)
    assert texts == others
    for name in one.fisher:
        torch.testing.assert_close(one.fisher[name], two.fisher[name], rtol=1e-5, atol=1e-9)
    assert one.ledger.tasks[0].generated == two.ledger.tasks[0].generated


def test_with_the_matrices_of_inputs(gpt2: Path) -> None:
    result = consolidate.fisher(gpt2, **FEW, structure="inputs")
    assert result["status"] == "done"
    assert result["factors"] is not None
    stored = read_fisher(gpt2 / "fisher")
    assert stored.factors is not None
    name = "transformer.h.0.mlp.c_fc.weight"
    block = stored.factors[f"{name}.R"].diagonal().sum()
    parts = [stored.fisher[name].sum(), stored.fisher[name.replace("weight", "bias")].sum()]
    torch.testing.assert_close(block, sum(parts), rtol=1e-4, atol=0)


def test_beside_a_task_with_data(gpt2: Path, tmp_path: Path) -> None:
    data = tmp_path / "old.jsonl"
    data.write_text('{"text": "the cat sat"}\n')
    consolidate.fisher(gpt2, data)
    consolidate.fisher(gpt2, **FEW, add=True)
    names = [task.name for task in read_fisher(gpt2 / "fisher").ledger.tasks]
    assert names == ["old", "self"]
    with pytest.raises(InputError, match="already exists: --overwrite replaces it"):
        consolidate.fisher(gpt2, **FEW)


def test_a_dry_run_estimates_and_writes_nothing(gpt2: Path, capsys: Any) -> None:
    before = contents(gpt2)
    words = ("fisher", gpt2, "--generate", 1000, "--max-length", 8, "--dry-run")
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "examples     1,000, mc\n" in out
    assert "generation " in out
    assert "another batch size changes at most about " in out
    cost = json.loads(run(capsys, *words, "--json")[1])
    assert cost["generation_seconds"] > 0
    assert cost["seconds"] > 50 * cost["seconds_per_example"]
    assert 0 <= cost["generation_changed"] < 0.01
    assert contents(gpt2) == before


def test_a_dry_run_of_a_huge_number_takes_little(gpt2: Path, capsys: Any) -> None:
    words = ("fisher", gpt2, "--generate", 2 * 10**9, "--max-length", 8, "--dry-run", "--json")
    few = json.loads(run(capsys, *words, "--mc-samples", 8)[1])
    many = json.loads(run(capsys, *words, "--mc-samples", 8 * 10**11)[1])
    assert few["examples"] == many["examples"] == 2 * 10**9
    assert few["seconds"] > 10**6
    assert 10**10 < many["seconds"] / few["seconds"] < 10**12


def test_the_whole_way_for_a_model_of_others(gpt2: Path, tmp_path: Path, hub: Hub) -> None:
    hub.put("them/model", gpt2)
    (tmp_path / "new.jsonl").write_text('{"text": "the cat sat"}\n')

    def done(*words: object) -> str:
        variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
        code, out, err = loopback_hub.run(tmp_path, *words, **variables)
        assert code == 0, err
        return out

    done(
        "fisher",
        "them/model",
        *["--generate", "6", "--max-length", "8", "--output-dir", "measured"],
    )
    theirs = ("--base-model", "them/model")
    done("push", "measured", "me/fisher", "--fisher-only", *theirs, "--fisher-dtype", "bfloat16")
    assert "measured on texts that the model generated: self" in done(
        "verify", "me/fisher", *theirs
    )
    files = hub.repositories["me/fisher"].files
    card = files["README.md"].decode()
    assert "6 examples, 48 tokens, 6 generated texts, max length 8" in card
    assert "BF16" in card
    assert (
        "on texts that the model generated itself, and on no other data: it follows from the "
        "weights alone. The ledger has no digest of any data." in card
    )
    out = tmp_path / "mine"
    done(
        *("finetune", "them/model", "--fisher", "me/fisher", "--data", "new.jsonl"),
        *("--ewc-lambda", 10, "--max-steps", 2, "--output-dir", out),
    )
    assert [task.name for task in read_fisher(out / "fisher").ledger.tasks] == ["self", "new"]

    # Rounded to 8 bits each value is off by at most 1/2⁸, and so is its part of the gradient.
    rounded = tmp_path / "rounded"
    shutil.copytree(gpt2, rounded)
    for name in (name for name in files if name.startswith("fisher/")):
        (rounded / name).parent.mkdir(exist_ok=True)
        (rounded / name).write_bytes(files[name])
    moved, found = load_model(open_checkpoint(out)).module, []
    for folder in (tmp_path / "measured", rounded):
        moved.zero_grad()
        for parameter in moved.parameters():
            parameter.grad = torch.zeros_like(parameter)
        consolidate.load_penalty(moved, folder, ewc_lambda=10.0).add_gradient_()
        found.append(
            torch.cat([p.grad.flatten() for p in moved.parameters() if p.grad is not None])
        )
    assert found[0].norm() > 0
    assert not torch.equal(*found)
    assert ((found[1] - found[0]).abs() <= 2.0**-8 * found[0].abs() + 1e-30).all()
    assert (found[1] - found[0]).norm() < 2.0**-8 * found[0].norm() / 1.5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"generate": 0}, "--generate 0: expected at least 1"),
    "data too": ({"data": "x.jsonl"}, "cannot be combined with --data: the model's own texts"),
    "a subset": ({"max_examples": 3}, "cannot be combined with --max-examples: N is their number"),
    "empirical": ({"estimator": "empirical"}, "cannot be combined with --estimator empirical"),
    "packing": ({"pack": True}, "cannot be combined with --split, --pack"),
    "loss": ({"loss_on": "all"}, "cannot be combined with --split, --pack, --loss-on"),
    "shard": ({"shard": True}, "cannot be combined with --shard"),
    "temperature": ({"temperature": 0.0}, "--temperature 0.0: expected a finite number above 0"),
    "top-p": ({"top_p": 1.5}, "--top-p 1.5: expected a number above 0 to 1"),
    "a folder": ({"save_generated": "."}, "is a folder; name a file"),
    "too long": ({"max_length": 90}, "--max-length 90: the model reads 40 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_it_is_refused(gpt2: Path, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises((UsageError, InputError), match=message):
        consolidate.fisher(gpt2, **{**FEW, **options})
    assert not (gpt2 / "fisher").exists()


@pytest.mark.parametrize("option", ["prompts", "temperature", "top_p", "save_generated"])
def test_its_options_need_it(gpt2: Path, option: str) -> None:
    value = 0.5 if option in ("temperature", "top_p") else "file"
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} needs --generate"):
        consolidate.fisher(gpt2, "x.jsonl", **{option: value})


def test_a_link_to_itself_takes_no_texts(gpt2: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises((UsageError, InputError), match="loop"):
        consolidate.fisher(gpt2, **FEW, save_generated=loop)
    assert loop.is_symlink()


@pytest.mark.parametrize("name", ["gpt2/model.safetensors", "out/texts.jsonl", "p.txt"])
def test_texts_are_not_written_over_other_files_of_the_command(
    gpt2: Path, tmp_path: Path, name: str
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("rain\n")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="--save-generated"):
        consolidate.fisher(
            gpt2,
            **FEW,
            prompts=prompts,
            save_generated=tmp_path / name,
            output_dir=tmp_path / "out",
            overwrite=True,
        )
    assert contents(tmp_path) == before


def test_an_existing_file_is_not_replaced_unless_asked(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, options = tmp_path / "texts.jsonl", {**FEW, "save_generated": tmp_path / "texts.jsonl"}
    texts.write_text("mine\n")
    monkeypatch.delattr(fisher_command, "load")  # it is refused before that
    with pytest.raises(InputError, match="already exists"):
        consolidate.fisher(gpt2, **options)
    monkeypatch.undo()
    assert texts.read_text() == "mine\n"
    assert not (gpt2 / "fisher").exists()
    consolidate.fisher(gpt2, **options, overwrite=True)
    assert len(texts.read_text().splitlines()) == 6


def test_token_ids_that_no_model_has(gpt2: Path) -> None:
    path = gpt2 / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2**70, -5, 0]}))
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"pad_token_id": 99999}))
    assert consolidate.fisher(gpt2, **FEW)["status"] == "done"


def test_a_tiny_temperature_takes_the_likeliest_token(gpt2: Path, tmp_path: Path) -> None:
    texts = []
    for temperature in (1e-6, 1e-320):
        path = tmp_path / f"{temperature}.jsonl"
        consolidate.fisher(
            gpt2,
            **FEW,
            temperature=temperature,
            save_generated=path,
            output_dir=tmp_path / path.stem,
        )
        texts.append(path.read_text())
    assert texts[0] == texts[1]


def test_neither_data_nor_texts(gpt2: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "fisher", gpt2)
    assert code == 2
    assert "fisher needs --data, or --generate N for a causal language model" in err


def test_a_module_of_ones_own_is_refused(network_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--model names a module of your own"):
        consolidate.fisher(network_checkpoint, generate=3, **NETWORK)


def test_outputs_that_are_not_finite_are_refused(gpt2: Path) -> None:
    weights = load_file(gpt2 / "model.safetensors")
    weights["transformer.ln_f.weight"].fill_(3e38)  # finite, while the logits are not
    save_file(weights, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="generated text 1, token 1"):
        consolidate.fisher(gpt2, **FEW)
    assert not (gpt2 / "fisher").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(gpt2: Path, dtype: torch.dtype) -> None:
    name, weights = "transformer.h.0.mlp.c_fc.weight", load_file(gpt2 / "model.safetensors")
    weights[name] = weights[name].to(dtype)
    save_file(weights, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=rf"quantized weights \(tensor '{name}' is .* have no gradients"
    ):
        consolidate.fisher(gpt2, **FEW)
    change_config(gpt2, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"quantized weights \(by the quantization_config"):
        consolidate.fisher(gpt2, **FEW)
    assert not (gpt2 / "fisher").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_full_disk_for_the_texts(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts, real = tmp_path / "texts.jsonl", os.fsync

    def full(number: int) -> None:
        if "texts.jsonl" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"texts\.jsonl: the disk or the quota is full"):
        consolidate.fisher(gpt2, **FEW, save_generated=texts)
    assert not texts.exists()
    assert not list(tmp_path.glob(".texts*"))
    assert not (gpt2 / "fisher").exists()
    monkeypatch.setattr(os, "fsync", real)  # there is room again
    caplog.set_level("INFO", "consolidate")
    consolidate.fisher(gpt2, **FEW, save_generated=texts)
    assert "resuming after 6 of 6 generated texts" in caplog.text
    assert len(texts.read_text().splitlines()) == 6


def test_a_task_that_was_trained_is_not_measured_on_generated_texts(
    gpt2: Path, tmp_path: Path
) -> None:
    data = tmp_path / "self.jsonl"
    data.write_text('{"text": "the cat sat"}\n')
    consolidate.finetune(
        gpt2, data, output_dir=tmp_path / "out", penalty="none", max_steps=1, no_fisher=True
    )
    # Without any Fisher there is no ledger either; beside one there is.
    consolidate.fisher(gpt2, **{**FEW, "task": "first"})
    consolidate.finetune(
        gpt2, data, output_dir=tmp_path / "two", ewc_lambda=1, max_steps=1, no_fisher=True
    )
    with pytest.raises(UsageError, match="self was trained on data and is measured on data"):
        consolidate.fisher(tmp_path / "two", **FEW)


def test_texts_are_kept_as_they_are() -> None:
    written = resume.Written([[3, 1], [2], [5, 5, 5]], most=2, halvings=1)
    tensors, state = resume.texts_to_keep(written)
    stored: Any = type("Stored", (), {"tensors": tensors, "state": state})
    assert resume.kept_texts(stored) == written
    assert resume.kept_texts(None) is None
