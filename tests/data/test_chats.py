import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import consolidate
from consolidate.data import chats
from consolidate.data.encoding import encode
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.options import Columns, Encoding
from consolidate.views.summary import show_text
from formats.checkpoint import open_checkpoint
from formats.data import Rows, open_data
from formats.errors import InputError, UsageError
from formats.fisher_json import read_ledger
from support import reference
from support.tiny_models import bert_config, byte_tokenizer, gpt2_config, save, word_tokenizer

BODY = (
    "{% if tools %}<T>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{% if m['role'] == 'assistant' %}BEGIN{{ m['content'] }}{{ eos_token }}END"
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = BODY.replace("BEGIN", "").replace("END", "")
MARKED = BODY.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")

SEVERAL = [
    {"role": "system", "content": "rain"},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": "ate it"},
    {"role": "user", "content": "what a day"},
    {"role": "assistant", "content": "lovely"},
]
ONE = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def jsonl(path: Path, *rows: dict[str, Any]) -> Rows:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_data(path)


def gpt2(folder: Path, template: str = PLAIN, tokenizer: Any = None) -> Model:
    tokenizer = tokenizer or byte_tokenizer(pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    config = gpt2_config(bos_token_id=0, eos_token_id=0)
    config.vocab_size, config.n_positions = len(tokenizer), 200
    save(folder / "model", transformers.GPT2LMHeadModel, config, tokenizer)
    return load_model(open_checkpoint(folder / "model"))


def documents(rows: Rows, model: Model, **options: Any) -> list[tuple[list[int], list[int]]]:
    batches = encode(rows, model, Encoding(**options)).batches(1)
    return [(inputs["input_ids"][0].tolist(), labels[0].tolist()) for inputs, labels in batches]


def said(model: Model, labels: list[int]) -> list[str]:
    """The predicted texts, one for each run of predicted tokens."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [model.processor.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_turns_of_the_assistant_alone_are_predicted(template: str, tmp_path: Path) -> None:
    model = gpt2(tmp_path, template)
    rows = jsonl(tmp_path / "chats.jsonl", {"messages": SEVERAL}, {"messages": ONE})
    whole = documents(rows, model)
    for (ids, labels), (same, everything) in zip(
        documents(rows, model, loss_on="assistant"), whole, strict=True
    ):
        assert ids == same == everything
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    turns = [said(model, labels) for _, labels in documents(rows, model, loss_on="assistant")]
    assert turns == [
        ["ate it<|endoftext|>", "lovely<|endoftext|>"],
        ["sat on the mat<|endoftext|>"],
    ]
    text = model.processor.decode(whole[0][0])
    assert text.startswith("<system>rain\n<user>a dog\n<assistant>ate it<|endoftext|><user>what")
    how = "as the chat template marks them"
    if template == PLAIN:
        how = "found by prefixes, as the chat template has no {% generation %} mask"
    notes = encode(rows, model, Encoding(loss_on="assistant")).notes
    assert notes == [f"chats.jsonl: loss on the assistant's turns, {how}"]
    assert encode(rows, model, Encoding(loss_on="all")).notes == ["chats.jsonl: loss on all tokens"]
    (note,) = encode(rows, model).notes
    assert note.startswith("chats.jsonl: loss on all tokens; --loss-on assistant takes")


def test_tools_are_given_to_the_template(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    given: list[Any] = [TOOLS, json.dumps(TOOLS), None, "", []]
    rows = jsonl(tmp_path / "a.jsonl", *({"messages": ONE, "tools": tools} for tools in given))
    texts = [model.processor.decode(ids) for ids, _ in documents(rows, model, loss_on="assistant")]
    assert texts[0] == texts[1]
    assert texts[0].startswith('<T>[{"type": "function", "function": {"name": "look"')
    assert texts[2] == texts[3] == texts[4] == texts[0].partition("\n")[2]
    assert "without the tools" not in encode(rows, model).notes[0]
    model.processor.chat_template = PLAIN.partition("{% endif %}")[2]
    assert encode(rows, model, Encoding(loss_on="all")).notes == [
        "a.jsonl: loss on all tokens, without the tools, which the chat template does not use"
    ]
    assert (
        encode(rows, model, Encoding(loss_on="assistant"))
        .notes[0]
        .endswith("generation %} mask, without the tools, which the chat template does not use")
    )
    model.processor.chat_template = {"tool_use": PLAIN, "other": PLAIN}
    with pytest.raises(InputError, match="model: This model has multiple chat templates"):
        encode(rows, model)
    model.processor.chat_template = {"tool_use": PLAIN, "default": "none"}
    kinds = [model.processor.decode(ids)[:3] for ids, _ in documents(rows, model)]
    assert kinds == ["<T>", "<T>", "non", "non", "<us"]
    for wrong, found in (("look", "'look'"), ([1], "1 in the list"), ({}, "an object of 0")):
        rows = jsonl(tmp_path / "b.jsonl", {"messages": ONE}, {"messages": ONE, "tools": wrong})
        message = rf"b\.jsonl, row 2.*'tools': expected a list of tools as JSON schemas, .*{found}"
        with pytest.raises(InputError, match=message):
            encode(rows, model)


def test_chats_of_a_table_are_json(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    quoted = json.dumps(ONE).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{quoted}"\n')
    expected = documents(jsonl(tmp_path / "a.jsonl", {"messages": ONE}), model)
    assert documents(open_data(tmp_path / "a.csv"), model) == expected
    for wrong, found in (("hello", "'hello'"), ("[[" * 9999, "a list|'"), ("[]", "an empty list")):
        (tmp_path / "b.csv").write_text(f"messages\n{wrong}\n")
        with pytest.raises(InputError, match=f"expected a list of messages .* found ({found})"):
            encode(open_data(tmp_path / "b.csv"), model)


def test_nulls_that_a_table_fills_in_are_left_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tools = [{"name": "look", "parameters": {name: {"type": "string"}}} for name in ("city", "day")]
    whole = [{"messages": ONE, "tools": [one]} for one in tools]
    parquet.write_table(pyarrow.Table.from_pylist(whole), tmp_path / "chats.parquet")
    model, rows = gpt2(tmp_path), open_data(tmp_path / "chats.parquet")
    assert rows[0]["tools"][0]["parameters"]["day"] is None
    assert documents(rows, model) == documents(jsonl(tmp_path / "chats.jsonl", *whole), model)


def test_messages_may_each_be_json(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    texts = jsonl(tmp_path / "a.jsonl", {"messages": [json.dumps(one) for one in ONE]})
    assert documents(texts, model) == documents(
        jsonl(tmp_path / "b.jsonl", {"messages": ONE}), model
    )


def test_prefixes_find_what_the_template_marks(tmp_path: Path) -> None:
    model = gpt2(tmp_path, MARKED)
    rows = jsonl(tmp_path / "a.jsonl", *ROWS, {"messages": [*ONE, *ONE[1:]], "tools": TOOLS})
    marked = documents(rows, model, loss_on="assistant")
    model.processor.chat_template = PLAIN
    assert documents(rows, model, loss_on="assistant") == marked


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_prompt_and_its_completion_may_be_messages(template: str, tmp_path: Path) -> None:
    model = gpt2(tmp_path, template)
    row = {"prompt": SEVERAL[:4], "completion": SEVERAL[4:]}
    rows = jsonl(tmp_path / "a.jsonl", row)
    whole = documents(jsonl(tmp_path / "b.jsonl", {"messages": SEVERAL}), model)
    ((ids, labels),) = documents(rows, model)
    assert ids == whole[0][0]
    assert said(model, labels) == ["lovely<|endoftext|>"]
    assert documents(rows, model, loss_on="completion") == [(ids, labels)]
    assert documents(rows, model, loss_on="all") == whole
    ((ids, labels),) = documents(rows, model, loss_on="assistant")
    assert said(model, labels) == ["ate it<|endoftext|>", "lovely<|endoftext|>"]
    # the prompt's beginning is cut first
    ((short, labels),) = documents(rows, model, max_length=9)
    assert short == ids[-9:]
    assert said(model, labels) == ["lovely<|endoftext|>"]
    mixed = jsonl(tmp_path / "c.jsonl", row, {"prompt": "a", "completion": "b"})
    assert len(documents(mixed, model)) == 2
    with pytest.raises(InputError, match=r"row 2.*needs a chat .*, found a text; leave --loss-on"):
        encode(mixed, model, Encoding(loss_on="assistant"))
    with pytest.raises(InputError, match=r"'completion': expected a list of messages .*'b'"):
        encode(jsonl(tmp_path / "d.jsonl", row | {"completion": "b"}), model)


def test_named_prompts_are_read_beside_chats(tmp_path: Path) -> None:
    model = gpt2(tmp_path, PLAIN)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": ONE, "question": "the cat", "answer": " sat"})
    named = encode(rows, model, Encoding(columns=Columns(prompt="question", completion="answer")))
    inputs, _ = next(iter(named.batches(1)))
    assert model.processor.decode(inputs["input_ids"][0]) == "the cat sat<|endoftext|>"


def test_the_loss_can_be_on_prompts_too(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    rows = jsonl(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": " sat"})
    ((ids, labels),) = documents(rows, model, loss_on="all")
    assert labels == ids
    assert model.processor.decode(ids) == "the cat sat<|endoftext|>"
    ((same, labels),) = documents(rows, model)
    assert same == ids
    assert said(model, labels) == [" sat<|endoftext|>"]


def test_what_the_rows_lack_is_refused(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    texts = jsonl(tmp_path / "texts.jsonl", {"text": "the cat"})
    for loss_on, needed in (("assistant", "a chat"), ("completion", "a prompt and its completion")):
        message = rf"texts\.jsonl, row 1.*'text': --loss-on {loss_on} needs {needed}.*found a text"
        with pytest.raises(InputError, match=message):
            encode(texts, model, Encoding(loss_on=loss_on))
    talks = jsonl(tmp_path / "chats.jsonl", {"messages": SEVERAL})
    with pytest.raises(InputError, match=r"row 1.*needs a prompt.*found a chat of 5 messages"):
        encode(talks, model, Encoding(loss_on="completion"))
    prompts = jsonl(tmp_path / "prompts.jsonl", {"prompt": "the", "completion": "cat"})
    with pytest.raises(InputError, match=r"prompts\.jsonl, row 1.*needs a chat .*found a text"):
        encode(prompts, model, Encoding(loss_on="assistant"))
    silent = jsonl(tmp_path / "silent.jsonl", {"messages": ONE[:1]}, {"messages": ONE[:1]})
    with pytest.raises(InputError, match=r"silent\.jsonl.*turns with the role 'assistant'.*none"):
        encode(silent, model, Encoding(loss_on="assistant"))
    some = jsonl(tmp_path / "some.jsonl", {"messages": ONE[:1]}, {"messages": ONE})
    left_out = "1 of 2 rows have nothing to predict and were left out"
    assert left_out in encode(some, model, Encoding(loss_on="assistant")).notes
    save(tmp_path / "bert" / "model", transformers.BertForMaskedLM, bert_config(), word_tokenizer())
    bert = load_model(open_checkpoint(tmp_path / "bert" / "model"))
    with pytest.raises(UsageError, match="--loss-on is for causal language models, not for masked"):
        encode(texts, bert, Encoding(loss_on="all"))


def test_prefixes_have_to_begin_the_chat(tmp_path: Path) -> None:
    # as templates do that drop the reasoning of earlier turns
    shortening = PLAIN.replace("m['content']", "(m['content'] if loop.last else m['content'][:2])")
    model = gpt2(tmp_path, shortening)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": ONE}, {"messages": SEVERAL})
    with pytest.raises(InputError) as caught:
        encode(rows, model, Encoding(loss_on="assistant"))
    message = str(caught.value)
    assert "a.jsonl, row 1 (line 1), column 'messages', turn 2: cannot tell which tokens" in message
    assert "expected the chat to begin with what is before it, found another token 7" in message
    assert "{% generation %} … {% endgeneration %}, or use --loss-on all" in message
    assert len(documents(rows, model)) == 2
    model.processor.chat_template = PLAIN.replace(
        "{{ m['content'] }}{{ eos_token }}",
        "{{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}",
    )
    with pytest.raises(InputError, match=r"row 2.*turn 3: .* what is up to it, found another"):
        encode(rows, model, Encoding(loss_on="assistant"))
    first = jsonl(tmp_path / "b.jsonl", {"messages": SEVERAL[2:]})
    with pytest.raises(InputError, match=r"turn 1: cannot tell .* nothing stands before it"):
        encode(first, model, Encoding(loss_on="assistant"))
    model.processor.chat_template = MARKED  # which needs no prefixes
    ((_, labels),) = documents(first, model, loss_on="assistant")
    assert said(model, labels) == ["ate it<|endoftext|>", "lovely<|endoftext|>"]


def test_a_template_without_a_generation_prompt(tmp_path: Path) -> None:
    model = gpt2(tmp_path, PLAIN.partition("{% if add_generation_prompt")[0])
    rows = jsonl(tmp_path / "a.jsonl", {"messages": ONE})
    examples = encode(rows, model, Encoding(loss_on="assistant"))
    assert said(model, examples.collate([0])[1][0].tolist()) == [
        "<assistant>sat on the mat<|endoftext|>"
    ]
    assert "with their headers, as the chat template has no generation prompt" in examples.notes[0]


def test_turns_that_were_cut_off_are_counted(tmp_path: Path) -> None:
    model = gpt2(tmp_path, MARKED)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": SEVERAL}, {"messages": ONE}, {"messages": ONE})
    ids, labels = documents(rows, model, loss_on="assistant")[1]
    before = next(n for n, label in enumerate(labels) if label != -100)
    examples = encode(rows, model, Encoding(loss_on="assistant", max_length=before + 2))
    assert len(examples) == 2
    inputs, labels = examples.collate([0])
    assert inputs["input_ids"][0].tolist() == ids[: before + 2]
    assert (labels != -100).sum() == 2
    cut, left_out, _ = examples.notes_on()
    assert cut == f"2 of 2 texts were truncated to {before + 2} tokens"
    assert left_out == (
        "1 of 3 rows have nothing to predict and were left out; in 1 of them truncation to "
        f"{before + 2} tokens cut it off"
    )
    with pytest.raises(InputError, match=r"truncation to 3 tokens cut off all .* in 3 of 3 rows"):
        encode(rows, model, Encoding(loss_on="assistant", max_length=3))


def test_packed_chats_keep_their_labels(tmp_path: Path) -> None:
    model = gpt2(tmp_path, MARKED)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": SEVERAL}, {"messages": ONE})
    alone = documents(rows, model, loss_on="assistant")
    blocks = documents(rows, model, loss_on="assistant", pack=True, max_length=20)
    assert all(len(ids) <= 20 for ids, _ in blocks)
    joined, packed = (
        [label for _, labels in some for label in labels if label != -100]
        for some in (alone, blocks)
    )
    assert joined == packed


def test_a_template_cannot_write_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "MAX_CHARACTERS", 1000)
    model = gpt2(tmp_path, "{{ 'x' * 1001 }}{% generation %}{% endgeneration %}")
    rows = jsonl(tmp_path / "a.jsonl", {"messages": ONE})
    for loss_on in ("all", "assistant"):
        with pytest.raises(InputError, match=r"row 1.*writes 1,001 characters: expected at most"):
            encode(rows, model, Encoding(loss_on=loss_on))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**5) %}{% for j in range(10**5) if i > j %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% for i in [[], []] recursive %}{{ loop([[], []]) if depth != 99 }}{% endfor %}",
    ],
    ids=["loops", "filtered", "macro", "recursive"],
)
@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_a_template_cannot_compute_without_end(
    template: str, loss_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "MAX_LINES", 1000)
    model = gpt2(tmp_path, MARKED)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": ONE})
    encode(rows, model, Encoding(loss_on=loss_on))
    model.processor.chat_template = MARKED + template
    before = sys.gettrace()
    with pytest.raises(InputError, match=r"row 1.*template of .*model runs more than 1,000 lines"):
        encode(rows, model, Encoding(loss_on=loss_on))
    assert sys.gettrace() is before


def test_neither_the_day_nor_chance_changes_what_a_template_writes(tmp_path: Path) -> None:
    """As the templates of Llama 3 ask for the date: by a clock where there is one."""
    dated = (
        "\n  {%- if strftime_now is defined %}\n  {%- set date = strftime_now('%d %b %Y') %}"
        "\n  {%- else %}\n  {%- set date = '26 Jul 2024' %}\n  {%- endif %}\n"
        "Today Date: {{ date }} {{ strftime_now('%Y-%m-%d') + '.' }} {{ range(10**4) | random }}\n"
    )
    model = gpt2(tmp_path, dated + PLAIN)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": ONE})
    first, second = (documents(rows, model)[0][0] for _ in range(2))
    assert first == second
    text = model.processor.decode(first)
    assert text.startswith("Today Date: 26 Jul 2024 2024-07-26. ")
    assert "2024-07-26 as the chat template's current date" in encode(rows, model).notes[0]
    # All but the date is as the template writes it.
    plain = gpt2(tmp_path / "plain", " \n  {% if true %}\n a{% endif %}\n" + PLAIN)
    clock = gpt2(
        tmp_path / "clock", " \n  {% if true %}\n a{% endif %}\n" + PLAIN + "{# strftime_now #}"
    )
    assert documents(rows, plain) == documents(rows, clock)
    for code, written in chats._DAY.items():
        if not code.startswith("%-") and code != "%p":
            assert datetime.date(2024, 7, 26).strftime(code) == written


ROWS: list[dict[str, Any]] = [
    {"messages": SEVERAL},
    {"messages": ONE},
    {"messages": [*SEVERAL[1:], *ONE]},
]


# transformers names an option of trl's own default otherwise by now
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("loss_on", "rows", "config"),
    [
        ("assistant", ROWS, {"assistant_only_loss": True}),
        ("assistant", ROWS, {"assistant_only_loss": True, "max_length": 30}),
        # As a text: datasets before 5 fill in the keys that are missing.
        (
            "assistant",
            [{**row, "tools": json.dumps(TOOLS)} for row in ROWS],
            {"assistant_only_loss": True},
        ),
        (None, ROWS, {}),
        (None, [{"prompt": SEVERAL[:4], "completion": SEVERAL[4:]}], {}),
        (
            "all",
            [{"prompt": SEVERAL[:4], "completion": SEVERAL[4:]}],
            {"completion_only_loss": False},
        ),
        (
            "assistant",
            [{"prompt": SEVERAL[:4], "completion": SEVERAL[4:]}],
            {"completion_only_loss": False, "assistant_only_loss": True},
        ),
        (None, [{"prompt": "the cat", "completion": " sat on the mat"}], {}),
        (None, [{"text": "the cat sat"}], {}),
    ],
)
def test_labels_are_those_of_trl(
    loss_on: str | None, rows: list[dict[str, Any]], config: dict[str, Any], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    model = gpt2(tmp_path, MARKED)
    trainer = trl.SFTTrainer(
        model=model.module,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            report_to=[],
            use_cpu=True,
            bf16=False,
            **{"max_length": 150, **config},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=model.processor,
    )
    length = config.get("max_length", 150)
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    expected = [(one["input_ids"][0].tolist(), one["labels"][0].tolist()) for one in batches]
    found = documents(jsonl(tmp_path / "a.jsonl", *rows), model, loss_on=loss_on, max_length=length)
    assert found == expected


def slow_exact(module: Any, inputs: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum p(y) (∇ log p(y))² over every predicted token and every y, one position at a time."""
    named = dict(module.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    logits = module(**inputs).logits[0]
    for t in range(len(labels) - 1):
        if labels[t + 1] == -100:
            continue
        log_p = logits[t] - logits[t].exp().sum().log()
        gradients = torch.autograd.grad(
            log_p,
            list(named.values()),
            torch.eye(len(log_p), dtype=torch.float64),
            is_grads_batched=True,
            retain_graph=True,
            materialize_grads=True,
        )
        for name, gradient in zip(named, gradients, strict=True):
            total[name] += torch.tensordot(log_p.exp().detach(), gradient**2, dims=1)
    return total


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_fisher_is_that_of_the_assistants_tokens(
    estimator: str, template: str, tmp_path: Path
) -> None:
    words = word_tokenizer()  # so few that every outcome can be measured
    words.eos_token = "[SEP]"
    model = gpt2(tmp_path, template, words)
    rows = jsonl(tmp_path / "a.jsonl", {"messages": SEVERAL}, {"messages": ONE})
    result = consolidate.fisher(
        tmp_path / "model",
        tmp_path / "a.jsonl",
        loss_on="assistant",
        estimator=estimator,
        max_outcomes=10**5 if estimator == "exact" else None,
        batch_size=2,
    )
    singles = list(encode(rows, model, Encoding(loss_on="assistant")).batches(1))
    module = model.module.double().eval()
    units = sum(int((labels != -100).sum()) for _, labels in singles)
    if estimator == "empirical":
        expected = reference.fisher(module, singles, "next-token-softmax", "empirical")
    else:
        sums = [slow_exact(module, inputs, labels[0]) for inputs, labels in singles]
        expected = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    assert result["units"] == units
    found = load_file(tmp_path / "model" / "fisher" / "fisher.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(found[name].double(), values / units, rtol=1e-3, atol=1e-9), name


def ledger(folder: Path) -> Any:
    return read_ledger(folder / "fisher" / "fisher.json")


def test_the_ledger_records_what_is_not_the_default(tmp_path: Path) -> None:
    gpt2(tmp_path)
    start, data = tmp_path / "model", tmp_path / "a.jsonl"
    jsonl(data, {"messages": SEVERAL}, {"messages": ONE})
    usual = consolidate.fisher(start, data, task="a", output_dir=tmp_path / "usual")
    assert (usual["loss_on"], usual["max_length"]) == ("all", None)
    content = (tmp_path / "usual" / "fisher" / "fisher.json").read_text()
    assert '"version": 1' in content
    assert "loss_on" not in content
    given: dict[str, Any] = {"task": "a", "output_dir": tmp_path / "out", "max_length": 40}
    done = consolidate.fisher(start, data, loss_on="assistant", **given)
    assert (done["loss_on"], done["max_length"]) == ("assistant", 40)
    assert done["units"] < usual["units"]
    task = ledger(tmp_path / "out").tasks[0]
    assert (task.loss_on, task.max_length) == ("assistant", 40)
    assert '"version": 2' in (tmp_path / "out" / "fisher" / "fisher.json").read_text()
    again = consolidate.fisher(start, data, loss_on="assistant", **given)
    assert (again["status"], again["loss_on"], again["max_length"]) == ("cached", "assistant", 40)
    again = consolidate.fisher(start, data, task="a", output_dir=tmp_path / "usual")
    assert (again["status"], again["loss_on"], again["max_length"]) == ("cached", "all", None)
    with pytest.raises(InputError, match="with --overwrite"):
        consolidate.fisher(start, data, loss_on="all", **given)
    summary = consolidate.show(tmp_path / "out")
    assert summary["tasks"][0]["loss_on"] == "assistant"
    assert "tokens, loss on the assistant's turns, max length 40" in show_text(summary)


def test_training_follows_the_turns_of_the_assistant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="consolidate")
    model = gpt2(tmp_path)
    start, data = tmp_path / "model", tmp_path / "a.jsonl"
    rows = jsonl(data, {"messages": SEVERAL}, {"messages": ONE})
    jsonl(tmp_path / "old.jsonl", {"text": "the cat sat"})
    found = consolidate.finetune(
        start,
        data,
        task="new",
        output_dir=tmp_path / "out",
        penalty="none",
        loss_on="assistant",
        evaluate={"new": data, "old": tmp_path / "old.jsonl"},
        learning_rate=1e-2,
        epochs=3,
    )
    assert found["loss_on"] == "assistant"
    assert "old has no tokens for --loss-on assistant: the default is used" in caplog.messages
    assert any("a.jsonl: loss on the assistant's turns, found" in m for m in caplog.messages)
    assert ledger(tmp_path / "out").tasks[0].loss_on == "assistant"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tokens, loss on the assistant's turns |" in card
    losses = []
    for inputs, labels in encode(rows, model, Encoding(loss_on="assistant")).batches(1):
        log_p = model.module.eval()(**inputs).logits[0].detach().double().log_softmax(-1)
        losses += [-log_p[t - 1, y] for t, y in enumerate(labels[0].tolist()) if y != -100]
    expected = float(torch.stack(losses).mean())
    assert found["metrics"]["before"]["new"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["metrics"]["after"]["new"]["loss"] < expected
    scores = consolidate.evaluate(start, data, loss_on="assistant")
    assert scores["a"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert consolidate.evaluate(start, data)["a"]["loss"] != pytest.approx(expected, rel=1e-3)


def test_a_chain_takes_it_from_its_run_file(tmp_path: Path) -> None:
    gpt2(tmp_path, MARKED)
    jsonl(tmp_path / "a.jsonl", {"messages": SEVERAL}, {"messages": ONE})
    path = tmp_path / "tasks.toml"
    head = 'output-dir = "out"\nstart = "model"\n[defaults]\nmax-steps = 1\nfreeze = ["*.h.*"]\n'
    path.write_text(f'{head}loss-on = "assistant"\n[[task]]\nname = "a"\ndata = "a.jsonl"\n')
    first = consolidate.run(path)
    assert ledger(Path(first["checkpoint"])).tasks[0].loss_on == "assistant"
    assert [step["status"] for step in consolidate.run(path)["steps"]][-1] == "skipped"
    path.write_text(path.read_text().replace('"assistant"', '"all"'))
    (*_, step) = consolidate.run(path, dry_run=True)["steps"]
    assert step["status"] == "to be done"
    assert "loss-on assistant → all" in str(step["reason"])
