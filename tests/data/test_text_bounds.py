"""Long texts: what is cut before it is tokenized, and that the tokens kept are the same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from consolidate.data import text_bounds
from consolidate.data.encoding import encode
from consolidate.data.text_bounds import begin, shortened
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.options import Encoding
from formats.checkpoint import open_checkpoint
from formats.data import Rows, open_data
from formats.errors import InputError
from support.tiny_models import (
    CORPUS,
    bert_config,
    byte_tokenizer,
    gpt2_config,
    save,
    word_tokenizer,
)

PIECES = [*" ".join(CORPUS).split(), " " * 50, "\n", "ab", "é", "e\u0301", "ΑΣ", "、猫", "x1-"]


RUNS = [*PIECES, "a" * 300]


def written(rng: random.Random, count: int, pieces: list[str] = PIECES) -> str:
    return "".join(rng.choice(pieces) + rng.choice(["", " ", " ", "  "]) for _ in range(count))


def trained(kind: str) -> Any:
    special = ["<unk>", "<s>", "</s>"]
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    if kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:  # as Llama's: the whole text is one word
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Metaspace()
    rng = random.Random(0)
    tokenizer.train_from_iterator([*CORPUS, *(written(rng, 30) for _ in range(20))], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {
    "words": word_tokenizer,
    "bytes": byte_tokenizer,
    "wordpiece": lambda: trained("wordpiece"),
    "bpe": lambda: trained("bpe"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_kept_are_those_of_the_whole_text(
    name: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_bounds, "_LEAST", 8)
    monkeypatch.setattr(text_bounds, "_UNITS", 2)
    tokenizer, rng, cut = TOKENIZERS[name](), random.Random(1), 0
    for _ in range(150):
        pieces = PIECES if name == "wordpiece" else RUNS
        text, most = written(rng, rng.randint(1, 200), pieces), rng.randint(8, 30)
        part = shortened(tokenizer, text, most, last=last, kinds=("text",))
        cut += len(part) < len(text)
        whole, some = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, part))
        kept = slice(-most, None) if last else slice(most)
        assert some[kept] == whole[kept]
    assert cut > 50


def test_a_text_of_an_ordinary_length_is_not_looked_at() -> None:
    def never(part: str) -> int:
        raise AssertionError(part)

    text = "x" * 65_536
    assert begin(text, never, 512) is text
    assert begin(text * 2, never, 2048) == text * 2  # 64 characters a token


def test_the_part_grows_until_it_has_tokens() -> None:
    text = " " * 500_000 + "a " * 500_000
    assert begin(text, lambda part: part.count("a"), 100) == text[: 65_536 * 16 - 1]
    assert begin(" " * 10**6, lambda part: 0, 100) == " " * 10**6
    assert begin(["a"] * 10**6, len, 100) == ["a"] * 65_536


def bert(folder: Path, head: str = "SequenceClassification", **options: Any) -> Model:
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    cls = getattr(transformers, f"BertFor{head}")
    save(folder / "model", cls, bert_config(**names), word_tokenizer())
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return load_model(open_checkpoint(folder / "model"))


def gpt2(folder: Path) -> Model:
    save(folder / "model", transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    return load_model(open_checkpoint(folder / "model"))


def jsonl(folder: Path, row: dict[str, Any]) -> Rows:
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    return open_data(folder / "data.jsonl")


LONG = "the cat sat, " * 40_000  # 520,000 characters
WORDS = {"tokens": LONG.split(), "labels": ["good"] * 120_000}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SequenceClassification", {"text": LONG, "label": "good"}),
    ("SequenceClassification", {"text": LONG, "text_pair": "rain again", "label": "good"}),
    ("MaskedLM", {"text": LONG}),
    ("TokenClassification", WORDS),
    ("gpt2", {"text": LONG}),
    ("gpt2", {"prompt": LONG + "what a lovely day", "completion": "it is"}),
    ("gpt2", {"prompt": "what a", "completion": LONG}),
]


@pytest.mark.parametrize(("head", "row"), CASES)
def test_a_long_text_is_cut_before_it_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, row: dict[str, Any]
) -> None:
    model = gpt2(tmp_path) if head == "gpt2" else bert(tmp_path, head)
    rows, longest = jsonl(tmp_path, row), 0
    tokenize = type(model.processor).__call__

    def counted(self: Any, text: Any = None, text_pair: Any = None, **options: Any) -> Any:
        nonlocal longest
        lists = [one if isinstance(one, list) else [one] for one in (text, text_pair) if one]
        longest = max(longest, *(len(one) for texts in lists for one in texts))
        return tokenize(self, text, text_pair, **options)

    monkeypatch.setattr(type(model.processor), "__call__", counted)
    cut = encode(rows, model, seed=3)
    assert 65_500 < longest <= 65_536
    monkeypatch.setattr(text_bounds, "_LEAST", 10**9)
    whole = encode(rows, model, seed=3)
    assert cut.notes == whole.notes
    inputs, labels = cut.collate([0])
    assert inputs["input_ids"].shape == (1, 40)
    for name, values in whole.collate([0])[0].items():
        assert inputs[name].equal(values)
    assert labels.equal(whole.collate([0])[1])


def test_a_packed_text_is_whole(tmp_path: Path) -> None:
    model = gpt2(tmp_path)
    assert len(encode(jsonl(tmp_path, {"text": LONG}), model, Encoding(pack=True))) > 5_000


@pytest.mark.parametrize("stated", ["x", [1], True, 0, -3, float("nan")])
def test_a_tokenizer_whose_longest_text_is_no_number(tmp_path: Path, stated: Any) -> None:
    model = bert(tmp_path, model_max_length=stated)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: model_max_length: expected a"):
        encode(jsonl(tmp_path, {"text": "a", "label": "good"}), model)


@pytest.mark.parametrize(
    ("stated", "kept"), [(None, 40), (1e30, 40), (10**400, 40), (8.0, 8), (8, 8)]
)
def test_a_tokenizer_that_states_its_longest_text(tmp_path: Path, stated: Any, kept: int) -> None:
    model = bert(tmp_path, model_max_length=stated)
    examples = encode(jsonl(tmp_path, {"text": LONG, "label": "good"}), model)
    assert examples.length(0) == kept
