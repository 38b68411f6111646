"""Checkpoints that hold a tied weight under several names, or under another than transformers'."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consolidate.api import finetune, fisher, merge, verify
from consolidate.chain.module_fisher import store_fisher
from consolidate.chain.module_penalty import load_penalty
from consolidate.data.encoding import encode
from consolidate.models.loading import load_model
from consolidate.training.trainer_callback import penalty_callback
from formats.checkpoint import open_checkpoint
from formats.errors import InputError
from formats.fisher_folder import read_fisher
from formats.task_file import open_task
from support import reference
from support.checkpoints import Write
from support.faults import break_off, killed_and_resumed
from support.loopback_hub import TOKEN, Hub, run
from support.tiny_models import (
    CORPUS,
    bert_config,
    byte_tokenizer,
    change_config,
    gpt2_config,
    save,
    word_tokenizer,
)

FORMS = ("both", "second", "copies")
NAMES = {  # the names of each tied tensor, the one that `save_pretrained` writes first
    "bert": [
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
        ["cls.predictions.bias", "cls.predictions.decoder.bias"],
    ],
    "gpt2": [["transformer.wte.weight", "lm_head.weight"]],
    "bart": [
        [
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ]
    ],
}


def bart_config() -> Any:
    return transformers.BartConfig(
        vocab_size=len(word_tokenizer()),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=40,
        decoder_start_token_id=0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        forced_eos_token_id=3,
    )


def saved(folder: Path, kind: str) -> Path:
    """A model as transformers saves it, with every tied weight once."""
    if kind == "gpt2":
        return save(folder, transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    if kind == "bert":
        return save(folder, transformers.BertForMaskedLM, bert_config(), word_tokenizer())
    cls = transformers.BartForConditionalGeneration
    return save(folder, cls, bart_config(), word_tokenizer())


def stored_as(form: str, once: Path, kind: str, folder: Path) -> Path:
    """The same checkpoint with its tied weights under all their names, or under the last alone."""
    shutil.copytree(once, folder, ignore=shutil.ignore_patterns("fisher", "model.safetensors"))
    module = getattr(
        transformers, json.loads((once / "config.json").read_text())["architectures"][0]
    ).from_pretrained(once)
    state = dict(module.state_dict())
    for names in NAMES[kind]:
        assert len({state[name].data_ptr() for name in names}) == 1
        for name in names[:-1] if form == "second" else ():
            del state[name]
    if form == "copies":
        state = {name: tensor.clone() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


def data(folder: Path, kind: str, task: str) -> Path:
    texts = CORPUS if task == "old" else [text[::-1] for text in CORPUS]
    rows = [
        {"prompt": text, "completion": texts[0]} if kind == "bart" else {"text": text}
        for text in texts
    ]
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_same(kind: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal bits by equal names, and by the last name where a tied weight has no other."""
    last = {names[0]: names[-1] for names in NAMES[kind]}
    assert expected
    for name, values in expected.items():
        assert torch.equal(found[name if name in found else last[name]], values), name
    assert all(len({*names} & {*found}) <= 1 for names in NAMES[kind]) or len(found) > len(expected)


def assert_form(kind: str, folder: Path, start: Path) -> dict[str, Tensor]:
    """What was written has the names of what it was made from, and equal bytes under tied ones."""
    written = load_file(folder / "model.safetensors")
    assert list(open_checkpoint(folder).weights) == list(open_checkpoint(start).weights)
    for names in NAMES[kind]:
        first, *others = [name for name in names if name in written]
        assert all(torch.equal(written[other], written[first]) for other in others)
    ledger = read_fisher(folder / "fisher").ledger
    assert {n: why for n, why in ledger.unprotected.items() if "same tensor" in why} == {
        name: f"the same tensor as {names[0]}"
        for names in NAMES[kind]
        for name in names[1:]
        if name in written and names[0] in written
    }
    verify(folder)
    return written


def go_through(folder: Path, kind: str) -> dict[str, Path]:
    """Measure, measure into a new folder, fine-tune and merge; gives what each has written."""
    old, new = data(folder.parent, kind, "old"), data(folder.parent, kind, "new")
    made = {name: folder.parent / f"{folder.name}-{name}" for name in ("aside", "tuned", "merged")}
    fisher(folder, old, estimator="empirical")
    fisher(folder, new, task="aside", estimator="empirical", output_dir=made["aside"])
    finetune(
        folder,
        new,
        task="tuned",
        output_dir=made["tuned"],
        ewc_lambda=10.0,
        learning_rate=1e-3,
        max_steps=2,
        fisher_estimator="empirical",
    )
    merge([made["tuned"], made["aside"]], output_dir=made["merged"])
    return made


@pytest.fixture(scope="module", params=NAMES)
def written_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Path]]:
    """Of each architecture: its name, the model as transformers saves it, what was made of it."""
    once = saved(tmp_path_factory.mktemp(request.param) / "once", request.param)
    return request.param, once, go_through(once, request.param)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_with_tied_weights_in_another_form(
    tmp_path: Path, hub: Hub, written_once: tuple[str, Path, dict[str, Path]], form: str
) -> None:
    kind, once, expected = written_once
    folder = stored_as(form, once, kind, tmp_path / form)
    rows = data(tmp_path, kind, "old")
    assert fisher(folder, rows, estimator="empirical", dry_run=True)["status"] == "dry run"
    made = go_through(folder, kind)
    found, of_once = read_fisher(folder / "fisher"), read_fisher(once / "fisher")
    assert_same(kind, found.fisher, of_once.fisher)
    assert len(found.fisher) == len(of_once.fisher)
    verify(folder)
    for name, at in made.items():
        written = assert_form(kind, at, folder)
        assert_same(kind, written, load_file(expected[name] / "model.safetensors"))
        found, of_once = read_fisher(at / "fisher"), read_fisher(expected[name] / "fisher")
        assert_same(kind, found.fisher, of_once.fisher)
    if (kind, form) in (("bert", "both"), ("gpt2", "second"), ("bart", "copies")):
        code, out, err = run(
            tmp_path, "push", made["merged"], "user/tied", "--json",
            HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN,
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["weights"] == verify(made["merged"])["weights"]["digest"]


@pytest.mark.parametrize("form", FORMS)
def test_the_fisher_is_that_of_slow_loops_in_float64(tmp_path: Path, form: str) -> None:
    once = saved(tmp_path / "once", "gpt2")
    folder = stored_as(form, once, "gpt2", tmp_path / form)
    rows = data(tmp_path, "gpt2", "old")
    fisher(folder, rows, estimator="empirical")
    stored = read_fisher(folder / "fisher")
    module = transformers.GPT2LMHeadModel.from_pretrained(once)
    examples = encode(open_task(rows)[1], load_model(open_checkpoint(once)))
    sums = reference.fisher(module, examples.batches(1), "next-token-softmax", "empirical")
    units = stored.ledger.tasks[0].units
    assert len(stored.fisher) == len(sums)
    for name, values in sums.items():
        found = stored.fisher[name if name in stored.fisher else "lm_head.weight"]
        torch.testing.assert_close(found.double(), values / units, rtol=2e-5, atol=1e-12)


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with BERTs in every form, each fine-tuned on two tasks, and one with frozen ones."""
    folder = tmp_path_factory.mktemp("berts")
    once = saved(folder / "once", "bert")
    rows = {"a": data(folder, "bert", "old"), "b": data(folder, "bert", "new")}
    options: dict[str, Any] = {"penalty": "none", "max_steps": 1, "learning_rate": 1e-2}
    options["fisher_estimator"] = "empirical"
    for form in ("once", "both", "second"):
        at = once if form == "once" else stored_as(form, once, "bert", folder / form)
        for task, path in rows.items():
            finetune(at, path, task=task, output_dir=folder / f"{form}-{task}", **options)
    options["freeze"] = ["*.word_embeddings.weight", "cls.predictions.bias"]
    finetune(folder / "both", rows["a"], task="a", output_dir=folder / "frozen-a", **options)
    merge([folder / "once-a", folder / "once-b"], output_dir=folder / "merged")
    return folder


@pytest.mark.parametrize(
    ("first", "other"), [("once", "both"), ("both", "once"), ("both", "second"), ("second", "both")]
)
def test_models_that_store_tied_weights_differently_are_merged(
    tmp_path: Path, berts: Path, first: str, other: str
) -> None:
    out = tmp_path / "merged"
    merge([berts / f"{first}-a", berts / f"{other}-b"], output_dir=out)
    written = assert_form("bert", out, berts / first)
    assert_same("bert", written, load_file(berts / "merged" / "model.safetensors"))
    expected = read_fisher(berts / "merged" / "fisher").fisher
    assert_same("bert", read_fisher(out / "fisher").fisher, expected)


def test_tied_weights_that_one_model_had_frozen_are_the_others(tmp_path: Path, berts: Path) -> None:
    ledger = read_fisher(berts / "frozen-a" / "fisher").ledger
    assert ledger.unprotected["cls.predictions.bias"] == "frozen"
    out = tmp_path / "merged"
    merge([berts / "frozen-a", berts / "both-b"], output_dir=out)
    written = assert_form("bert", out, berts / "both")
    theirs = load_file(berts / "both-b" / "model.safetensors")
    for names in NAMES["bert"]:
        held = read_fisher(out / "fisher").fisher[names[0]] > 0
        assert held.any()
        assert torch.equal(written[names[1]][held], theirs[names[1]][held])


def test_models_without_a_name_in_common_for_a_tied_weight_are_not_merged(
    tmp_path: Path, berts: Path
) -> None:
    with pytest.raises(InputError, match=r"second-b has no tensor 'bert\.embeddings\.word_embedd"):
        merge([berts / "once-a", berts / "second-b"], output_dir=tmp_path / "merged")


def test_a_penalty_for_a_training_loop_of_ones_own(tmp_path: Path) -> None:
    once = saved(tmp_path / "once", "gpt2")
    rows = data(tmp_path, "gpt2", "old")
    values = []
    for form in ("once", *FORMS):
        folder = once if form == "once" else stored_as(form, once, "gpt2", tmp_path / form)
        fisher(folder, rows)
        module = transformers.GPT2LMHeadModel.from_pretrained(once)
        penalty = load_penalty(module, folder, ewc_lambda=10.0)
        penalty_callback(penalty)
        assert penalty.unprotected == []
        assert sum(p is module.lm_head.weight for p in penalty.parameters()) == 1
        with torch.no_grad():
            module.lm_head.weight += 0.1
        penalty.add_gradient_()
        assert module.transformer.wte.weight.grad is not None
        values.append((penalty.value(), float(module.transformer.wte.weight.grad.sum())))
    assert values[0][0] > 0
    for value in values[1:]:  # their sums are taken in the files' orders
        assert value == pytest.approx(values[0], rel=1e-5)


def test_a_run_with_tied_weights_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stored_as("both", saved(tmp_path / "once", "bert"), "bert", tmp_path / "both")
    old, new = data(tmp_path, "bert", "old"), data(tmp_path, "bert", "new")
    fisher(folder, old)
    options: dict[str, Any] = {
        "max_steps": 3,
        "batch_size": 4,
        "ewc_lambda": 10.0,
        "save_every_minutes": 0,
    }
    finetune(folder, new, output_dir=tmp_path / "whole", **options)
    command = partial(finetune, folder, new, output_dir=tmp_path / "killed", **options)
    killed_and_resumed(command, tmp_path / "killed", caplog, partial(break_off, monkeypatch, 2))
    for name in ("model.safetensors", "fisher/fisher.safetensors", "fisher/fisher.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- modules of the user's own -----------------------------------------------------------------


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def own(folder: Path, *, without: str = "", suffix: str = "pt", **changed: Tensor) -> Path:
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = dict(Own().state_dict()) | {n.replace("_", "."): t for n, t in changed.items()}
    state.pop(without, None)
    if suffix == "pt":
        torch.save(state, folder / "net.pt")
    else:
        copies = {name: tensor.clone() for name, tensor in state.items()}
        save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return folder


OWN = {"model": f"{__name__}:Own"}


def test_a_module_of_ones_own_with_tied_weights(tmp_path: Path, write_task: Write) -> None:
    old, new = write_task("old"), write_task("new", seed=1)
    once = own(tmp_path / "once", without="second.weight")
    forms = [
        own(tmp_path / "both"),
        own(tmp_path / "copies", suffix="safetensors"),
        own(tmp_path / "second", without="first.weight"),
    ]
    results = []
    for folder in (once, *forms):
        fisher(folder, old, **OWN)
        out = tmp_path / f"{folder.name}-out"
        finetune(folder, new, output_dir=out, ewc_lambda=1.0, max_steps=3, **OWN)
        verify(out)
        written = load_file(out / "model.safetensors")
        stored = read_fisher(out / "fisher")
        held = "second.weight" if folder.name == "second" else "first.weight"
        assert {*stored.fisher} == {held, "first.bias", "second.bias", "head.weight", "head.bias"}
        assert list(open_checkpoint(out).weights) == list(open_checkpoint(folder).weights)
        if folder in forms[:2]:
            assert torch.equal(written["first.weight"], written["second.weight"])
            assert stored.ledger.unprotected == {"second.weight": "the same tensor as first.weight"}
            Own().load_state_dict(written)  # which wants both names
        results.append((written[held], stored.fisher[held]))
    for weights, values in results[1:]:
        assert torch.equal(weights, results[0][0])
        assert torch.equal(values, results[0][1])


@pytest.mark.parametrize("dry_run", [True, False])
def test_copies_that_differ_are_refused(tmp_path: Path, write_task: Write, dry_run: bool) -> None:
    folder = own(tmp_path / "differ", second_weight=torch.ones(6, 6))
    message = r"first\.weight and second\.weight are one tensor in the model: expected equal"
    with pytest.raises(InputError, match=message):
        fisher(folder, write_task("old"), dry_run=dry_run, **OWN)
    assert [path.name for path in folder.iterdir()] == ["net.pt"]


# --- before a pass -----------------------------------------------------------------------------


class WithPhase(Own):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) * self.phase.real)


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_no_ledger_can_hold_is_refused_before_the_pass(
    tmp_path: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    (tmp_path / "phase").mkdir()
    torch.save(WithPhase().state_dict(), tmp_path / "phase" / "net.pt")
    monkeypatch.setattr(
        "consolidate.commands.measurement.fisher_diagonal", None
    )  # no pass may begin
    with pytest.raises(InputError, match=r"'phase': its weight is C64, a dtype without gradients"):
        fisher(
            tmp_path / "phase", write_task("old"), model=f"{__name__}:WithPhase", dry_run=dry_run
        )


def test_a_tensor_with_two_fishers_is_refused_before_the_pass(tmp_path: Path) -> None:
    once = saved(tmp_path / "once", "gpt2")
    folder = stored_as("copies", once, "gpt2", tmp_path / "copies")
    change_config(folder, tie_word_embeddings=False)
    fisher(folder, data(tmp_path, "gpt2", "old"), estimator="empirical")
    assert {*NAMES["gpt2"][0]} <= {*read_fisher(folder / "fisher").fisher}
    change_config(folder, tie_word_embeddings=True)
    message = "transformer.wte.weight and lm_head.weight are one tensor|lm_head.weight and trans"
    new = data(tmp_path, "gpt2", "new")
    with pytest.raises(InputError, match=message):
        fisher(folder, new, add=True, dry_run=True)
    with pytest.raises(InputError, match=message):
        finetune(folder, new, output_dir=tmp_path / "out", ewc_lambda=1.0)
    with pytest.raises(InputError, match=message):
        load_penalty(transformers.GPT2LMHeadModel.from_pretrained(once), folder, ewc_lambda=1.0)


def test_a_ledger_that_calls_two_tensors_one_is_found_out(
    tmp_path: Path, write_task: Write
) -> None:
    folder = own(tmp_path / "both")
    fisher(folder, write_task("old"), freeze=["first.bias"], **OWN)
    path = folder / "fisher" / "fisher.json"
    text = path.read_text()
    assert text.count('"frozen"') == 1
    path.write_text(text.replace('"frozen"', '"the same tensor as second.bias"'))
    with pytest.raises(InputError, match="is listed as the same tensor as 'second"):
        verify(folder)


def test_what_was_measured_by_hand_is_stored(tmp_path: Path) -> None:
    from consolidate.estimation.fisher_diagonal import fisher_diagonal
    from consolidate.estimation.likelihoods import get_likelihood

    folder = own(tmp_path / "both")
    module = Own()
    module.load_state_dict(torch.load(folder / "net.pt"))
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    diagonal = fisher_diagonal(module, batches, get_likelihood("softmax"))
    ledger = store_fisher(module, folder, diagonal, task="old", objective="classification")
    assert ledger.unprotected == {"second.weight": "the same tensor as first.weight"}
    verify(folder)
