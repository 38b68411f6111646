"""Generated texts as examples: what is counted, what is refused, what memory and caches change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from consolidate.data import generation
from consolidate.data.generation import examples_of, generate, json_lines
from consolidate.data.prompts import NoPrompts, open_prompts
from consolidate.data.text_plan import TextPlan, plan_texts
from consolidate.estimation.likelihoods import IGNORED, get_likelihood
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.models.sampling import Written
from consolidate.options import Generation
from formats.checkpoint import open_checkpoint
from formats.errors import InputError, UsageError
from formats.rows import Rows
from support.networks import NETWORK
from support.tiny_models import (
    SIZES,
    bert_config,
    byte_tokenizer,
    change_config,
    gpt2_config,
    save,
    word_tokenizer,
)

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '.' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return save(
        tmp_path / "gpt2", transformers.GPT2LMHeadModel, gpt2_config(**TOKENS), byte_tokenizer()
    )


def opened(folder: Path) -> Model:
    return load_model(open_checkpoint(folder))


def planned(model: Model, count: int = 6, prompts: Rows | None = None, **options: Any) -> TextPlan:
    settings = {"max_length": None, "batch_size": 4, "seed": 0} | options
    return plan_texts(model, prompts or NoPrompts(), Generation(count), **settings)


def lines(path: Path, *texts: str) -> Rows:
    path.write_text("".join(f"{text}\n" for text in texts))
    return open_prompts(path)


def test_texts_begin_with_the_first_token_and_have_a_length(gpt2: Path) -> None:
    model = opened(gpt2)
    assert planned(model).starts == [[0]]
    assert planned(model).distribution.most == 39  # of 40 positions
    assert planned(model, max_length=39).distribution.most == 39
    with pytest.raises(UsageError, match="--max-length 40: the model reads 40 tokens, and what"):
        planned(model, max_length=40)
    long = gpt2.parent / "long"
    config = gpt2_config(**TOKENS)
    config.n_positions = 500
    save(long, transformers.GPT2LMHeadModel, config, byte_tokenizer())
    assert planned(opened(long)).distribution.most == 128


@pytest.mark.parametrize(
    ("tokenizer", "config", "expected", "ends"),
    [
        ({"bos_token": None, "eos_token": "c"}, {"bos_token_id": 5, "eos_token_id": 6}, 5, {6}),
        ({}, {"bos_token_id": 5, "eos_token_id": 6}, 0, {0, 6}),
        ({"bos_token": None}, {"bos_token_id": None, "eos_token_id": [7, 8]}, 0, {0, 7, 8}),
        ({"bos_token": None, "eos_token": None}, {"eos_token_id": [7, 8]}, 7, {7, 8}),
    ],
)
def test_where_the_first_token_and_the_ends_come_from(
    gpt2: Path, tokenizer: dict[str, Any], config: dict[str, Any], expected: int, ends: set[int]
) -> None:
    model = opened(gpt2)
    (gpt2 / "generation_config.json").unlink()
    for name, value in tokenizer.items():
        setattr(model.processor, name, value)
    if "c" in tokenizer.values():
        ends = ends | {model.processor.eos_token_id}
    for name in ("bos_token_id", "eos_token_id"):
        setattr(model.module.config, name, config.get(name))
    plan = planned(model)
    assert plan.prompt(0) == [expected]
    assert plan.distribution.ends == ends
    # transformers reads the ends of chats from there
    (gpt2 / "generation_config.json").write_text(json.dumps({"eos_token_id": [30, 31]}))
    assert {30, 31} <= planned(model).distribution.ends


def test_without_a_first_token_prompts_are_needed(gpt2: Path, tmp_path: Path) -> None:
    model = opened(gpt2)
    model.processor.bos_token = model.processor.eos_token = None
    model.module.config.bos_token_id = model.module.config.eos_token_id = None
    with pytest.raises(UsageError, match=r"neither tokenizer nor config has .*: give --prompts"):
        planned(model)
    assert len(planned(model, prompts=lines(tmp_path / "p.txt", "the cat")).starts) == 1
    model.module.config.bos_token_id = 50256
    with pytest.raises(InputError, match=r"bos_token_id: expected a token id below .* found 50256"):
        planned(model)


def test_prompts_are_used_in_turn_and_not_counted(gpt2: Path, tmp_path: Path) -> None:
    model = opened(gpt2)
    prompts = lines(tmp_path / "p.txt", "the cat sat", "rain")
    plan = planned(model, 5, prompts, max_length=7)
    encoded = [model.processor(text)["input_ids"] for text in ("the cat sat", "rain")]
    assert [plan.prompt(i) for i in range(5)] == [encoded[i % 2] for i in range(5)]
    assert list(plan.batches()) == [[1, 3], [0, 2, 4]]  # of one length each
    texts = plan.in_order(generate(model, plan))
    examples = examples_of(model, plan, texts)
    inputs, labels = examples.collate(range(5))
    units = get_likelihood("next-token-softmax").units(labels)
    assert units.tolist() == [len(text) for text in texts] == [7] * 5
    for i, prompt in enumerate(map(plan.prompt, range(5))):
        assert inputs["input_ids"][i, : len(prompt)].tolist() == prompt
        assert labels[i, : len(prompt)].tolist() == [IGNORED] * len(prompt)
        assert labels[i, len(prompt) : len(prompt) + 7].tolist() == texts[i]
    written = [json.loads(line) for line in json_lines(model, prompts, texts).splitlines()]
    assert [row["prompt"] for row in written[:3]] == ["the cat sat", "rain", "the cat sat"]
    assert written[0]["text"] == model.processor.decode(texts[0])


def test_a_prompt_of_a_chat_model_is_a_users_turn(gpt2: Path, tmp_path: Path) -> None:
    model = opened(gpt2)
    model.processor.chat_template = TEMPLATE
    plan = planned(model, 1, lines(tmp_path / "p.txt", "rain?"), max_length=5)
    assert model.processor.decode(plan.prompt(0)) == "user:rain?.assistant:"


def test_without_prompts_a_chat_model_begins_as_its_template_does(gpt2: Path) -> None:
    model = opened(gpt2)
    model.processor.chat_template = "{{ 'system:be kind.' }}" + TEMPLATE
    plan = planned(model, 3, max_length=5)
    assert model.processor.decode(plan.prompt(2)) == "system:be kind.user:"
    texts = plan.in_order(generate(model, plan))
    _, labels = examples_of(model, plan, texts).collate(range(3))
    opening = len(plan.prompt(0))
    assert all(row[:opening] == [IGNORED] * opening for row in labels.tolist())
    assert [row[opening : opening + 5] for row in labels.tolist()] == texts
    words = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model.processor.chat_template = words  # nothing before them
    assert planned(model).starts == [[0]]
    for template in (
        words.replace("content'] ", "content'] | upper "),
        words.replace("content", "role"),
    ):
        model.processor.chat_template = template
        with pytest.raises(InputError, match="leaves them out or changes them: measure with `cons"):
            planned(model)


CHAT_TEMPLATES = {
    "it raises": (
        "{{ raise_exception('roles must alternate') }}",
        r"row 1 \(line 1\): the chat template refuses these messages: roles must alternate",
    ),
    "no text": (
        "{% for message in messages %}{% endfor %}",
        r"row 1 \(line 1\): expected a prompt, found one without tokens once the chat ",
    ),
    "the prompt left out": (
        "{% for message in messages %}{{ message['role'] }}:{% endfor %}",
        r"row 1 \(line 1\): the chat template of .* leaves the prompt out: expected a template",
    ),
    "no template": ("{% if %}", "the chat template refuses these messages"),
}


@pytest.mark.parametrize("case", CHAT_TEMPLATES)
def test_chat_templates_that_cannot_be_used_are_refused(
    gpt2: Path, tmp_path: Path, case: str
) -> None:
    template, message = CHAT_TEMPLATES[case]
    model = opened(gpt2)
    model.processor.chat_template = template
    with pytest.raises(InputError, match=message):
        planned(model, 2, lines(tmp_path / "p.txt", "rain?", "the cat"))


def test_a_plan_of_many_texts_takes_no_memory(gpt2: Path, tmp_path: Path) -> None:
    plan = planned(opened(gpt2), 10**12, lines(tmp_path / "p.txt", "rain", "the cat", "rain"))
    batches = plan.batches()
    assert [next(batches) for _ in range(3)] == [[0, 2, 3, 5], [6, 8, 9, 11], [12, 14, 15, 17]]
    assert plan.first(6).count == 6
    assert plan.prompt(10**12 - 1) == plan.prompt(0)


def test_the_end_is_scored_and_nothing_after_it(gpt2: Path) -> None:
    model = opened(gpt2)
    plan = planned(model, 40, max_length=12)
    some = frozenset(range(0, 300, 5))  # so that texts end at different lengths
    plan = replace(plan, distribution=replace(plan.distribution, ends=some))
    texts = plan.in_order(generate(model, plan))
    lengths = {len(text) for text in texts}
    assert len(lengths) > 5
    for text in texts:
        assert not some & set(text[:-1])
        assert text[-1] in some or len(text) == 12
    labels = examples_of(model, plan, texts).collate(range(40))[1]
    assert (labels != IGNORED).sum(1).tolist() == [len(text) for text in texts]


def test_another_batch_size_gives_the_same_texts(gpt2: Path) -> None:
    model = opened(gpt2)
    found = []
    for size in (1, 4, 100):
        plan = planned(model, 9, batch_size=size)
        found.append(plan.in_order(generate(model, plan)))
    assert found[0] == found[1] == found[2]
    other = planned(model, 9, seed=1)
    assert other.in_order(generate(model, other)) != found[0]


def test_it_resumes_after_any_batch(gpt2: Path, tmp_path: Path) -> None:
    model = opened(gpt2)
    plan = planned(model, 9, lines(tmp_path / "p.txt", "rain", "the cat sat"))
    kept: list[Written] = []
    whole = generate(model, plan, keep=kept.append)
    assert [len(one.texts) for one in kept] == [4, 5, 9]
    for one in kept:
        assert generate(model, plan, start=one) == whole


def test_a_batch_without_memory_is_halved(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(gpt2)
    plan = planned(model, 9, batch_size=8)
    whole = plan.in_order(generate(model, plan))
    real = generation.continued

    def small(module: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        if len(prompts) > most:
            raise torch.OutOfMemoryError("out of memory")
        return real(module, prompts, *rest, **options)

    monkeypatch.setattr(generation, "continued", small)
    most, notes = 3, list[str]()
    written = generate(model, plan, note=notes.append)
    assert plan.in_order(written) == whole
    assert (written.most, written.halvings) == (2, 2)
    assert notes[0] == "out of memory with 8 texts: continuing with 4"
    most = 0
    with pytest.raises(InputError, match=r"single generated text: lower --max-length"):
        generate(model, plan)


def test_a_cache_that_changes_the_outputs_is_not_used(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=2, **TOKENS
    )
    folder = save(tmp_path / "mamba", transformers.MambaForCausalLM, config, byte_tokenizer())
    model, notes = opened(folder), list[str]()
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter *= 3
    plan = planned(model, 5, max_length=8)
    texts = plan.in_order(generate(model, plan, note=notes.append))
    assert notes == [
        "the cache of MambaForCausalLM changes its outputs: generating without it, more slowly"
    ]
    for text in texts:  # what it says without a cache
        with torch.no_grad():
            logits = model.module(torch.tensor([[0, *text]])).logits[0].double()
        sums = logits.softmax(-1).cumsum(-1)
        numbers = generation_uniforms(texts.index(text), len(text))
        drawn = torch.searchsorted(sums[: len(text)], numbers[:, None], right=True)[:, 0]
        assert drawn.tolist() == text


def generation_uniforms(text: int, count: int) -> torch.Tensor:
    from consolidate.runtime.randomness import uniforms

    return uniforms(0, torch.tensor([text]), count, stream=4)[0]


def test_a_cache_that_fails_is_not_used(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, notes = opened(gpt2), list[str]()
    plan = planned(model)
    whole = generate(model, plan)
    real = generation.continued

    def strange(*arguments: Any, cached: bool) -> Any:
        if cached:
            raise TypeError("no cache")
        return real(*arguments, cached=False)

    monkeypatch.setattr(generation, "continued", strange)
    assert generate(model, plan, note=notes.append).texts == whole.texts
    assert notes[0].endswith(
        "does not run (TypeError: no cache): generating without it, more slowly"
    )


def test_models_without_a_distribution_over_texts_are_refused(
    tmp_path: Path, network_checkpoint: Path
) -> None:
    bert = bert_config()
    masked = save(tmp_path / "m", transformers.BertForMaskedLM, bert, word_tokenizer())
    with pytest.raises(UsageError, match="fills gaps and has no distribution over whole texts"):
        planned(opened(masked))
    labels = save(tmp_path / "c", transformers.BertForSequenceClassification, bert)
    with pytest.raises(UsageError, match="its objective sequence-classification generates no text"):
        planned(opened(labels))
    t5 = transformers.T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    pair = save(tmp_path / "t5", transformers.T5ForConditionalGeneration, t5, byte_tokenizer())
    with pytest.raises(UsageError, match="an encoder-decoder only generates from an input text"):
        planned(opened(pair))
    own = load_model(open_checkpoint(network_checkpoint), factory=NETWORK["model"])
    with pytest.raises(UsageError, match="--model names a module of your own"):
        planned(own)


def test_a_model_that_reads_ahead_is_refused(tmp_path: Path) -> None:
    config = bert_config(is_decoder=False)
    folder = save(tmp_path / "b", transformers.BertLMHeadModel, config, word_tokenizer())
    change_config(folder, architectures=["BertLMHeadModel"])
    model = opened(folder)
    model.processor.bos_token = "[CLS]"
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter *= 4
    with pytest.raises(UsageError, match="outputs of BertLMHeadModel change with the tokens after"):
        generate(model, planned(model))


def test_prompts_that_cannot_be_used_are_refused(gpt2: Path, tmp_path: Path) -> None:
    model, path = opened(gpt2), tmp_path / "p.txt"
    with pytest.raises(InputError, match=r"p\.txt: the prompts cannot be read: No such file"):
        open_prompts(path)
    path.write_text("\n  \n")
    with pytest.raises(InputError, match=r"p\.txt is empty: expected one prompt per line"):
        open_prompts(path)
    path.write_bytes(b"good\nbad \xff\n")
    with pytest.raises(InputError, match=r"p\.txt, line 2: byte 0xff is not UTF-8"):
        planned(model, prompts=open_prompts(path))
    with pytest.raises(InputError, match=r"row 2 \(line 2\): the prompt has 60 tokens"):
        planned(model, prompts=lines(path, "a", "x" * 60))
    model.processor.chat_template = "s" * 60 + TEMPLATE
    with pytest.raises(InputError, match="what a text begins with has 65 tokens: expected fewer"):
        planned(model)
    model.processor.chat_template = None
    rows = lines(path, "one\r", "", "two ")
    assert [row["prompt"] for row in rows] == ["one", "two "]
    model.processor = None
    with pytest.raises(InputError, match="--prompts need a tokenizer"):
        planned(model, prompts=rows)


def test_llama_too(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=1, **SIZES, **TOKENS)
    folder = save(tmp_path / "llama", transformers.LlamaForCausalLM, config, byte_tokenizer())
    model, notes = opened(folder), list[str]()
    plan = planned(model)
    texts = plan.in_order(generate(model, plan, note=notes.append))
    assert notes == []
    assert all(len(text) == 39 or text[-1] == 0 for text in texts)
