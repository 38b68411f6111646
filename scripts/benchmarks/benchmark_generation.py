"""Measure what a Fisher of generated texts depends on: batch size, rounding, chance: generation.md.

--model names the folder of a causal language model.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import consolidate
from consolidate.data.prompts import NoPrompts
from consolidate.data.text_plan import TextPlan, plan_texts
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.models.sampling import continued, reread, up_to_end
from consolidate.options import Generation
from formats.checkpoint import open_checkpoint
from formats.fisher_folder import read_fisher
from scripts.benchmarks.harness import Size, make_checkpoint, start, write_page
from scripts.experiments.lib.common import markdown

TEXT = """
# Generated texts: batch size, rounding, chance

`fisher --generate` on {name}, {parameters:,} parameters.{quick}

## Other batch sizes

{texts} texts of at most {length} tokens, from seed 0, written with each batch size. A text
*differs* if a token of it is another than in the texts of batch size {most}. Token t of text i is
drawn with the same number whatever the batch, so only rounding makes it another; what follows it
then differs too. *Foreseen* is the largest share to expect, as `fisher` reports it from the first
two texts, here from all: it compares the probabilities of a text written step by step with those of
the text read whole.

{batches}

*Tokens/s* are tokens per second of processor time, *transformers* those of its `generate` with
the same batch, sampling without truncation: one call of {steps} steps for each row, the first of
the process included.

## Rounding to bfloat16

`push --fisher-dtype bfloat16` rounds each value of a Fisher to 8 significant bits. Measured on
{measured} generated texts of at most {length} tokens in float32, against another
{measured} texts from another seed:

{rounding}

The gradient of the penalty, λ F (θ − μ), has the same relative error in each weight. Rounding is
small beside what chance does with so few texts.
"""


class Batches(NamedTuple):
    """What a batch size gave."""

    texts: list[list[int]]
    foreseen: float
    rate: float  # tokens per second of processor time


def written(model: Model, plan: TextPlan) -> Batches:
    """Generate the texts of a plan, and read all of them again."""
    texts: dict[int, list[int]] = {}
    changed = seconds = 0.0
    ends = plan.distribution.ends
    for numbers in plan.batches():
        prompts = [plan.prompt(i) for i in numbers]
        began = time.process_time()
        found = continued(model.module, prompts, numbers, plan.distribution, cached=True)
        seconds += time.process_time() - began
        changed += len(numbers) * reread(model.module, found, plan.distribution).changed
        new = found.ids[:, len(prompts[0]) :].tolist()
        texts |= dict(zip(numbers, (up_to_end(ids, ends) for ids in new), strict=True))
    tokens = sum(map(len, texts.values()))
    return Batches([texts[i] for i in sorted(texts)], changed / plan.count, tokens / seconds)


def rate_of_transformers(model: Model, plan: TextPlan, steps: int) -> float:
    """Return the tokens per second of transformers' own loop, for a batch of a plan."""
    module: Any = model.module
    ids = torch.tensor([plan.prompt(i) for i in range(plan.batch_size)])
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    began = time.process_time()
    module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, pad_token_id=0, **options
    )
    return plan.batch_size * steps / (time.process_time() - began)


def percent(share: float) -> str:
    """Write a share with two digits."""
    return f"{float(f'{100 * share:.2g}'):g}%"


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first token, from 1, that differs; None if none does."""
    pairs = enumerate(zip_longest(one, other), 1)
    return next((n for n, (a, b) in pairs if a != b), None)


def batch_rows(
    folder: Path, dtype: torch.dtype, sizes: Sequence[int], texts: int, length: int, steps: int
) -> Iterator[list[str]]:
    """Write the table's rows of a dtype."""
    model = load_model(open_checkpoint(folder), dtype=dtype)
    last = None
    for size in sorted(sizes, reverse=True):
        asked = Generation(texts)
        plan = plan_texts(model, NoPrompts(), asked, max_length=length, batch_size=size, seed=0)
        found = written(model, plan)
        rate = rate_of_transformers(model, plan, steps)
        last = last or found
        places = [first_difference(a, b) for a, b in zip(last.texts, found.texts, strict=True)]
        differ = [place for place in places if place is not None]
        row = [
            f"{str(dtype).removeprefix('torch.')}, batch size {size}",
            "" if last is found else f"{len(differ)} of {texts}",
            f"{median(differ):.0f}" if differ else "",
            percent(found.foreseen),
            f"{found.rate:.3g}",
            f"{rate:.3g}",
        ]
        print(row, flush=True)
        yield row


def fisher_of(folder: Path, place: Path, texts: int, length: int, seed: int) -> dict[str, Tensor]:
    """Measure a Fisher on generated texts, and return it."""
    output = place / f"seed-{seed}"
    consolidate.fisher(
        folder,
        generate=texts,
        max_length=length,
        batch_size=min(texts, 8),
        seed=seed,
        output_dir=output,
        dtype="float32",
    )
    stored = read_fisher(output / "fisher").fisher
    return {name: stored[name].float() for name in stored}


def rounding_table(folder: Path, texts: int, length: int) -> str:
    """Compare the rounding of a Fisher with how far two samples of it lie apart."""
    with tempfile.TemporaryDirectory() as place:
        one, other = (fisher_of(folder, Path(place), texts, length, seed) for seed in (0, 1))
    rounded = {name: values.bfloat16() for name, values in one.items()}
    largest = lost = 0.0
    sums = {which: dict.fromkeys(("F", "√F", "trace"), 0.0) for which in ("rounded", "other")}
    for name, exact in one.items():
        f, positive = exact.double(), exact > 0
        off = (rounded[name].double() - f).abs()
        largest = max(largest, float((off / f)[positive].max()) if positive.any() else 0.0)
        lost += float((positive & (rounded[name] == 0)).sum())
        for which, values in (("rounded", rounded[name]), ("other", other[name])):
            g = values.double()
            sums[which]["F"] += float((g - f).square().sum())
            sums[which]["√F"] += float((g.sqrt() - f.sqrt()).square().sum())
            sums[which]["trace"] += float((g - f).sum())
    squares = sum(float(f.double().square().sum()) for f in one.values())
    trace = sum(float(f.double().sum()) for f in one.values())
    rows = [
        ["largest relative error of a value", percent(largest), ""],
        ["values above 0 that become 0", f"{lost:,.0f}", ""],
    ]
    for what, key, whole in (
        ("‖F̃ − F‖ / ‖F‖", "F", squares),
        ("‖√F̃ − √F‖ / ‖√F‖", "√F", trace),
    ):
        rows.append([what, *(percent((of[key] / whole) ** 0.5) for of in sums.values())])
    difference = "difference of the sum of all values"
    rows.append([difference, *(percent(abs(of["trace"] / trace)) for of in sums.values())])
    return markdown(["", "rounded", "another seed"], rows)


def main() -> None:
    """Measure and write the page."""
    parser = start(__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--name", default="a language model", help="what the page calls it")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--measured", type=int, default=16, help="texts that a Fisher is of")
    options = parser.parse_args()
    sizes = (1, 2) if options.quick else (1, 4, 8, 16)
    steps = 2 if options.quick else 16
    with tempfile.TemporaryDirectory() as place:
        folder = options.model
        if folder is None:
            folder = Path(place) / "model"
            make_checkpoint(folder, Size(16, 16, 1, 1, 1), vocabulary=200)
        rows = [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for row in batch_rows(folder, dtype, sizes, options.texts, options.max_length, steps)
        ]
        rounding = rounding_table(folder, options.measured, options.max_length)
        module = load_model(open_checkpoint(folder)).module
        parameters = sum(parameter.numel() for parameter in module.parameters())
    header = ["", "differ", "median first token", "foreseen", "tokens/s", "transformers"]
    page = TEXT.format(
        name=options.name,
        parameters=parameters,
        quick=" **A quick run: its figures mean nothing.**" * options.quick,
        texts=options.texts,
        length=options.max_length,
        most=max(sizes),
        steps=steps,
        batches=markdown(header, rows),
        measured=options.measured,
        rounding=rounding,
    )
    write_page("generation", page, quick=options.quick, packages=["transformers"])


if __name__ == "__main__":
    main()
