"""Every kind of file that is read: good ones, how they are damaged, and what reads them."""

import csv
import io
import json
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import numpy as np
import torch
import yaml
from huggingface_hub.utils import yaml_dump
from safetensors.torch import save_file
from torch import nn

from consolidate.api import report, show, verify
from consolidate.commands.report_search import read_search
from consolidate.commands.run_options import OPTIONS, read_options
from consolidate.data.benchmark_files import task_config, task_file_digest
from consolidate.data.encoding import encode
from consolidate.data.image_settings import read_preprocessing
from consolidate.models import adapters
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.options import Images
from consolidate.views.card import model_card
from consolidate.views.card_text import Subject
from consolidate.views.summary import show_text
from formats.checkpoint import check_finite, open_checkpoint, weight_records
from formats.data import open_data
from formats.digest import TensorRecord, set_digest
from formats.fisher_folder import read_fisher
from formats.hub_dataset import is_hub_id
from formats.partial_work import read_partial, write_partial
from formats.run_file import read_run_file
from formats.step_record import StepRecord, read_step_record, write_step_record
from formats.task_file import read_task_file
from formats.tensors import write_tensors
from scripts.benchmarks.harness import installed
from scripts.robustness.mutations import (
    mutated_json,
    mutated_lines,
    mutated_middle,
    mutated_png,
    mutated_safetensors,
    mutated_table,
    mutated_template,
    mutated_text,
    mutated_toml,
    mutated_yaml,
    mutated_zip,
)
from scripts.robustness.records import Record

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
FACTORY = "scripts.robustness.file_kinds:network"
CONVOLUTION = "scripts.robustness.file_kinds:convolution"
IMAGES = {
    "png": mutated_png,
    **dict.fromkeys(("jpg", "gif", "bmp", "tiff", "webp", "ppm"), mutated_middle),
}
ROWS = [
    {"text": "the cat sat on the mat", "label": 0, "more": [1, 2.5, None]},
    {"text": "a dog ate my homework", "label": 1, "more": []},
    {"text": "été 🙂 again", "label": 0, "more": [3.0]},
]
CHATS = [
    {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]},
    {"messages": [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "ate"}]},
]
TEMPLATE = """{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"""
SEARCH = {
    "lambda_search": {
        "ewc_lambda": 1.0,
        "new_task": "digits",
        "old_tasks": ["letters"],
        "trials": [
            {"ewc_lambda": 1.0, "steps": 3, "forgetting": 0.1, "penalty_per_lambda": 0.2,
             "divergence": None, "mean": 0.5, "chosen": True,
             "metrics": {"digits": {"score": 0.5}, "letters": {"score": 0.5}}}
        ],
    }
}  # fmt: skip


class HarmError(BaseException):
    """A reader that changed a file, or a message that could steer a terminal."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        write: Writes good files into an empty folder and names those that may be damaged.
        mutate: Damages the bytes of one.
        readers: What reads the folder.
        parse: What a plain parser of the format does with the bytes; it raises where it refuses.
    """

    write: Callable[[Path], list[str]]
    mutate: Callable[[bytes, Random], bytes]
    readers: tuple[Callable[[Path], Any], ...]
    parse: Callable[[bytes], Any]


def network(config: dict[str, Any]) -> nn.Module:
    """Make the network of `FACTORY`, as a user's factory would."""
    return nn.Sequential(nn.Linear(int(config["inputs"]), 3), nn.ReLU(), nn.Linear(3, 2))


def convolution(config: dict[str, Any]) -> nn.Module:
    """Make the network of `CONVOLUTION`."""
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def golden(name: str, files: list[str], folder: Path) -> list[str]:
    """Copy a golden checkpoint."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    return files


def write_card(folder: Path) -> list[str]:
    """Write a checkpoint with a model card, of which the last part is ours."""
    golden("anchor", [], folder)
    data = {"license": "mit", "tags": ["ewc", "mine"], "model-index": [{"name": "m"}]}
    data |= {"datasets": ["owner/zahlen"], "language": "de", "base_model": ["owner/base"]}
    body = "# A model\n\nWritten by a person.\n"
    ours = model_card(None, read_fisher(folder / "fisher").ledger, Subject("user/model"))
    end = ours.split("---\n", 2)[2]
    (folder / "README.md").write_text(f"---\n{yaml_dump(data)}---\n{body}\n{end}", encoding="utf-8")
    return ["README.md"]


def write_network(folder: Path) -> list[str]:
    """Write a network of one's own."""
    torch.manual_seed(0)
    weights = network({"inputs": 4}).state_dict()
    write_tensors(folder, weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"inputs": 4}))
    return ["config.json"]


def write_bert(folder: Path) -> list[str]:
    """Write a tiny model of transformers with a tokenizer."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return ["config.json"]


def write_pickle(folder: Path) -> list[str]:
    """Write weights as torch does."""
    torch.save({"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3)}, folder / "model.pt")
    return ["model.pt"]


def write_pass(folder: Path) -> list[str]:
    """Write the saved progress of an interrupted pass."""
    write_partial(folder / "fisher", {"w": torch.ones(3)}, {"done": 3}, {"seed": 0})
    return [path.name for path in folder.iterdir()]


def write_rows(suffix: str, folder: Path) -> list[str]:
    """Write task data of one kind."""
    file = folder / f"data.{suffix}"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    inputs, labels = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([0, 1, 0])
    match suffix:
        case "jsonl":
            file.write_text("".join(lines))
        case "json":
            file.write_text(json.dumps(ROWS, ensure_ascii=False))
        case "csv" | "tsv":
            with file.open("w", newline="") as table:
                writer = csv.writer(table, delimiter="," if suffix == "csv" else "\t")
                writer.writerows([("text", "label"), *((r["text"], r["label"]) for r in ROWS)])
        case "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        case "npz":
            np.savez(file, inputs=inputs, labels=labels)
        case "npz, deflated":
            file = folder / "data.npz"
            np.savez_compressed(file, inputs=inputs, labels=labels)
        case "safetensors":
            tensors = {"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
            write_tensors(folder, tensors, stem="data", metadata={})
        case _:  # images in folders by class
            from PIL import Image

            pixels = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
            for name in ("cat", "dog"):
                (folder / name).mkdir()
                Image.fromarray(pixels).save(folder / name / f"1.{suffix}")
            return [f"cat/1.{suffix}"]
    return [file.name]


def write_bert_data(damaged: str, folder: Path) -> list[str]:
    """Write a tiny model of transformers with data, one of whose files is damaged."""
    write_bert(folder)
    write_rows("jsonl", folder)
    return [damaged]


def write_chat_model(folder: Path) -> list[str]:
    """Write a tiny language model with a chat template, and chats."""
    import transformers

    write_bert(folder)
    (folder / "model.safetensors").unlink()
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=40)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return ["chat_template.jinja"]


def write_adapter(folder: Path) -> list[str]:
    """Write an adapter as peft does, and its base model."""
    (folder / "base").mkdir()
    write_bert(folder / "base")
    start = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
    factors = {f"{start}A.weight": torch.ones(2, 8), f"{start}B.weight": torch.ones(8, 2)}
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4}
    config |= {"target_modules": ["query"], "bias": "none", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ["adapter_config.json"]


def write_convolution(name: str, folder: Path) -> list[str]:
    """Write a network for images, and images; `name` says how images become inputs."""
    (folder / "rows").mkdir()
    write_rows("png", folder / "rows")
    torch.manual_seed(0)
    write_tensors(folder, convolution({}).state_dict(), metadata={"format": "pt"})
    timm = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    timm |= {"interpolation": "bicubic", "crop_mode": "center", "num_classes": 2}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": timm}))
    if name != "config.json":
        found: Record = {"size": {"shortest_edge": 8}, "crop_size": {"height": 6, "width": 6}}
        found |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        found |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
        (folder / name).write_text(json.dumps(found))
    return [name]


def write_saved(folder: Path) -> list[str]:
    """Write a dataset as `datasets` saves it to disk."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "rows")
    return [f"rows/{path.name}" for path in (folder / "rows").iterdir()]


def write_benchmark(folder: Path) -> list[str]:
    """Write a benchmark's task file and another that it includes."""
    (folder / "base.yaml").write_text(
        "task: base\ntest_split: test\noutput_type: multiple_choice\n"
    )
    (folder / "task.yaml").write_text(
        "include: base.yaml\ntask: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        "    test: data.jsonl\ndoc_to_text: '{{text}}'\ndoc_to_choice: [no, yes]\n"
    )
    write_rows("jsonl", folder)
    return ["task.yaml", "base.yaml"]


def write_search(folder: Path) -> list[str]:
    """Write the JSON result of a search for λ beside the checkpoint that it found."""
    golden("anchor", [], folder)
    (folder / "result.json").write_text(json.dumps(SEARCH))
    return ["result.json"]


def write_task(folder: Path) -> list[str]:
    """Write a task.toml and its data."""
    write_rows("jsonl", folder)
    (folder / "task.toml").write_text(
        'name = "news"\ndata = "data.jsonl"\nobjective = "sequence-classification"\n'
        'text_column = "text"\nlabel_column = "label"\n'
    )
    return ["task.toml"]


def write_run(folder: Path) -> list[str]:
    """Write a tasks.toml."""
    write_rows("jsonl", folder)
    (folder / "tasks.toml").write_text(
        'start = "model"\noutput-dir = "out"\n\n[evaluate]\n'
        'old = "data.jsonl"\n\n[defaults]\newc-lambda = 1e3\nepochs = 2\nfreeze = ["a.*", "b"]\n'
        'text-column = "text"\nlearning-rate = 1e-3\n\n[[task]]\nname = "one"\ndata = "data.jsonl"'
        '\nevaluate = "data.jsonl"\n\n[[task]]\nname = "two"\ndata = "data.jsonl"\ntrain = false\n'
        "seed = 7\n"
    )
    return ["tasks.toml"]


def write_step(folder: Path) -> list[str]:
    """Write the record of a step of a run."""
    record = StepRecord({"data": "0" * 64, "options": {"epochs": 2}}, {"weights": "1" * 64})
    write_step_record(folder / "01-one.json", record)
    return ["01-one.json"]


def read_weights(folder: Path) -> None:
    """Read a checkpoint's weights to the last byte."""
    source = open_checkpoint(folder)
    weight_records(source.weights)
    check_finite(source.weights, folder)


def read_shown(folder: Path) -> None:
    """Read what `consolidate show` reads, and look at what it prints."""
    printed = show_text(show(folder))
    if not all(line.isprintable() for line in printed.split("\n")):
        raise HarmError("a line of `show` could steer a terminal")


def read_reported(folder: Path) -> None:
    """Write the report, and look for a script in it."""
    page = folder.parent / "page.html"
    report(folder, output=page, overwrite=True)
    if "<script" in page.read_text(encoding="utf-8").lower():
        raise HarmError("the report holds a script")


def read_card(folder: Path) -> None:
    """Write a model card over the one that is there."""
    ledger = read_fisher(folder / "fisher").ledger
    existing = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    model_card(existing, ledger, Subject("user/model", open_checkpoint(folder).config))


def read_new_card(folder: Path) -> None:
    """Write a model card of a ledger, and look for a script in it."""
    ledger = read_fisher(folder / "fisher").ledger
    if "<script" in model_card(None, ledger, Subject("user/model")).lower():
        raise HarmError("the card holds a script")


def read_model(factory: str | None, folder: Path) -> None:
    """Load the model."""
    load_model(open_checkpoint(folder), factory=factory)


def read_rows(open_it: Callable[[Path], Any], folder: Path) -> None:
    """Read every row and column."""
    rows = open_it(folder)
    for i in range(min(len(rows), 100)):
        rows[i]
        rows.where(i, rows.columns[0])
    for column in rows.columns:
        rows.label_names(column)
        for _ in zip(range(100), rows.values(column), strict=False):
            pass
    rows.digest()


def read_examples(factory: str | None, open_it: Callable[[Path], Any], folder: Path) -> None:
    """Encode the data for a model and make batches."""
    examples = encode(open_it(folder), model(factory))
    for _ in examples.batches(2):
        pass


def read_task(folder: Path) -> None:
    """Read a task.toml and the data it names; a dataset on the Hub is not read."""
    task = read_task_file(folder / "task.toml")
    if Path(task.data).exists() or not is_hub_id(task.data):
        read_rows(open_data, Path(task.data))


def read_run(folder: Path) -> None:
    """Read a tasks.toml, options too."""
    run = read_run_file(folder / "tasks.toml", tuple(OPTIONS))
    for options in (run.defaults, *(task.options for task in run.tasks)):
        read_options(options, folder)


@cache
def model(factory: str | None) -> Model:
    """Give a good model to encode data for."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    try:
        (write_bert if factory is None else write_network)(folder)
        return load_model(open_checkpoint(folder), factory=factory)
    finally:
        shutil.rmtree(folder)


def repair_digests(ledger: Any) -> None:
    """Give a ledger the set digests of its records, so that what lies behind these is reached."""
    for name in ("weights", "fisher", "anchor"):
        try:
            found = ledger[name]
            found["digest"] = set_digest(
                {tensor: TensorRecord(**record) for tensor, record in found["tensors"].items()}
            )
        except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
            continue


def parse_safetensors(data: bytes) -> None:
    """Read the length of the header, and the header as a JSON object."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length or not isinstance(json.loads(data[8 : 8 + length]), dict):
        raise ValueError


def parse_lines(data: bytes) -> None:
    """Read JSON Lines."""
    for line in data.decode("utf-8-sig").splitlines():
        if line.strip():
            json.loads(line)


def parse_table(delimiter: str, data: bytes) -> None:
    """Read CSV or TSV."""
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    for _ in csv.reader(text, delimiter=delimiter, strict=True):
        pass


def parse_zip(data: bytes) -> None:
    """Read an archive, with its checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if archive.testzip() is not None:
            raise ValueError


def parse_parquet(data: bytes) -> None:
    """Read the description of a Parquet file."""
    import pyarrow.parquet

    pyarrow.parquet.ParquetFile(io.BytesIO(data)).close()


def parse_image(data: bytes) -> None:
    """Read the kind and the size of an image."""
    from PIL import Image

    Image.open(io.BytesIO(data)).close()


def parse_saved(data: bytes) -> None:
    """Read one file of a saved dataset: JSON, or the schema of an Arrow stream."""
    import pyarrow

    if data[:1] in b"{[":
        json.loads(data)
    else:
        pyarrow.ipc.open_stream(io.BytesIO(data))


def parse_toml(data: bytes) -> None:
    """Read TOML."""
    tomllib.loads(data.decode("utf-8-sig"))


def parse_template(data: bytes) -> None:
    """Read a template of jinja."""
    jinja2.Environment().parse(data.decode())


def mutated_saved(data: bytes, random: Random) -> bytes:
    """Damage one file of a saved dataset."""
    return (mutated_json if data[:1] in b"{[" else mutated_middle)(data, random)


def mutated_config(data: bytes, random: Random) -> bytes:
    """Damage a config of transformers; a third of them name code in the folder."""
    damaged = mutated_json(data, random)
    if random.random() < 0.33:
        code = b'{"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": '
        damaged = damaged.replace(b"{", code + b'"evil.Evil"}, ', 1)
    return damaged


def kinds() -> dict[str, Kind]:
    """Give every kind of file that is read."""
    return {**_kinds_of_checkpoints(), **_kinds_of_models(), **_kinds_of_data()}


def _kinds_of_checkpoints() -> dict[str, Kind]:
    whole = (read_weights, read_shown, verify)
    told = (*whole, read_new_card)
    ledger = partial(mutated_json, repair=repair_digests)
    one = "fisher/fisher.json"
    index = ["model.safetensors.index.json", "fisher/fisher.safetensors.index.json"]
    index += ["fisher/anchor.safetensors.index.json"]
    heads = ["fisher/heads/digits.safetensors", "fisher/fisher.safetensors"]
    heads += ["fisher/anchor.safetensors", "model.safetensors"]
    shards = ["model-00002-of-00003.safetensors", "fisher/anchor-00001-of-00002.safetensors"]
    factors = [f"fisher/factors-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = (mutated_safetensors, whole, parse_safetensors)
    return {
        "weights, Fisher, head, anchor": Kind(partial(golden, "anchor", heads), *tensors),
        "shard": Kind(partial(golden, "sharded", shards), *tensors),
        "factors": Kind(partial(golden, "version-2", factors), *tensors),
        "adapter": Kind(
            partial(golden, "adapter", ["adapter_model.safetensors", "fisher/fisher.safetensors"]),
            *tensors,
        ),
        "index": Kind(partial(golden, "sharded", index), mutated_json, whole, json.loads),
        "ledger": Kind(
            partial(golden, "anchor", [one]), ledger, (*told, read_reported), json.loads
        ),
        "ledger, version 2": Kind(partial(golden, "version-2", [one]), ledger, told, json.loads),
        "ledger of an adapter": Kind(partial(golden, "adapter", [one]), ledger, told, json.loads),
        "model card": Kind(write_card, mutated_text, (read_card,), bytes.decode),
        "pickle": Kind(write_pickle, mutated_zip, (read_weights,), parse_zip),
        "tasks.toml": Kind(write_run, mutated_toml, (read_run,), parse_toml),
        "record of a step": Kind(
            write_step,
            mutated_json,
            (lambda folder: read_step_record(folder / "01-one.json"),),
            json.loads,
        ),
        "saved progress": Kind(
            write_pass,
            mutated_safetensors,
            (lambda folder: read_partial(folder / "fisher"),),
            parse_safetensors,
        ),
        "result of a search": Kind(write_search, mutated_json, (read_found,), json.loads),
    }


def _kinds_of_models() -> dict[str, Kind]:
    loaded = (partial(read_model, None),)
    tokenized = (read_encoded,)
    own = (read_weights, partial(read_model, FACTORY))
    images = (read_images,)
    found = {
        "config.json, own network": Kind(write_network, mutated_json, own, json.loads),
        "config.json, images": Kind(
            partial(write_convolution, "config.json"), mutated_json, images, json.loads
        ),
        "preprocessor_config.json": Kind(
            partial(write_convolution, "preprocessor_config.json"), mutated_json, images, json.loads
        ),
    }
    if installed("transformers"):
        found |= {
            "config.json, transformers": Kind(write_bert, mutated_config, loaded, json.loads),
            "tokenizer_config.json": Kind(
                partial(write_bert_data, "tokenizer_config.json"),
                mutated_json,
                tokenized,
                json.loads,
            ),
            "tokenizer.json": Kind(
                partial(write_bert_data, "tokenizer.json"), mutated_json, tokenized, json.loads
            ),
            "chat template": Kind(write_chat_model, mutated_template, tokenized, parse_template),
        }
    if installed("peft"):
        found["adapter_config.json"] = Kind(
            write_adapter, mutated_json, (read_adapter,), json.loads
        )
    return found


def _kinds_of_data() -> dict[str, Kind]:
    with_text = installed("transformers")
    text = (partial(read_examples, None),) if with_text else ()
    tensors = (partial(read_examples, FACTORY),)
    found = {
        "task.toml": Kind(write_task, mutated_toml, (read_task,), parse_toml),
        "benchmark's YAML": Kind(write_benchmark, mutated_yaml, (read_benchmark,), yaml.safe_load),
    }
    for suffix, mutate, parse, encoded in (
        ("jsonl", mutated_lines, parse_lines, text),
        ("json", mutated_json, json.loads, text),
        ("csv", mutated_table, partial(parse_table, ","), text),
        ("tsv", mutated_table, partial(parse_table, "\t"), text),
        ("parquet", mutated_middle, parse_parquet, text),
        ("npz", mutated_zip, parse_zip, tensors),
        ("npz, deflated", mutated_zip, parse_zip, tensors),
        ("safetensors", mutated_safetensors, parse_safetensors, tensors),
    ):
        if suffix != "parquet" or installed("pyarrow"):
            opened = partial(_open_rows, suffix.partition(",")[0])
            readers = [partial(read_rows, opened), *(partial(e, opened) for e in encoded)]
            found[suffix] = Kind(partial(write_rows, suffix), mutate, tuple(readers), parse)
    if installed("Pillow"):
        whole = (partial(read_rows, open_data),)
        for suffix, mutate in IMAGES.items():
            written = partial(write_rows, suffix)
            found[f"image, {suffix}"] = Kind(written, mutate, whole, parse_image)
    if installed("datasets"):
        whole = (partial(read_rows, lambda folder: open_data(folder / "rows")),)
        found["saved dataset"] = Kind(write_saved, mutated_saved, whole, parse_saved)
    return found


def _open_rows(suffix: str, folder: Path) -> Any:
    return open_data(folder / f"data.{suffix}")


def read_encoded(folder: Path) -> None:
    """Load a model with its tokenizer and encode the data beside it."""
    examples = encode(open_data(folder / "data.jsonl"), load_model(open_checkpoint(folder)))
    for _ in examples.batches(2):
        pass


def read_images(folder: Path) -> None:
    """Load a network for images, and make its inputs from images."""
    checkpoint = open_checkpoint(folder)
    how = read_preprocessing(folder, checkpoint.config, Images(), convolution({}))
    rows = open_data(folder / "rows")
    how.pixels([rows[0]["image"]], rows.where(0, "image"))


def read_adapter(folder: Path) -> None:
    """Load an adapter into its base model."""
    checkpoint, base = open_checkpoint(folder), open_checkpoint(folder / "base")
    if checkpoint.adapter is not None:
        adapters.load(replace(checkpoint, base=base, config=base.config))


def read_benchmark(folder: Path) -> None:
    """Read a benchmark's task file; no function of it is run."""
    task_config(folder / "task.yaml")
    task_file_digest(folder / "task.yaml")


def read_found(folder: Path) -> None:
    """Read the result of a search for λ, as the report does."""
    ledger = read_fisher(folder / "fisher").ledger
    tasks = [replace(task, ewc_lambda=1.0) for task in ledger.tasks]
    read_search(folder / "result.json", replace(ledger, tasks=tasks), "model")
