"""Texts that a language model generates to measure its Fisher on: progress and records."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

from consolidate.chain.resume import KeptPass, KeptWork, keep_texts, kept_texts, texts_to_keep
from consolidate.data.generation import Texts, examples_of, generate, json_lines
from consolidate.data.text_examples import TextExamples
from consolidate.models.model import Model
from consolidate.models.sampling import Written
from consolidate.options import Estimation, Generation
from consolidate.results import Generated as GeneratedResult
from consolidate.runtime import signals
from consolidate.runtime.distributed import all_processes, is_first
from consolidate.runtime.progress import progress
from formats.atomic import write_file
from formats.errors import InputError
from formats.fisher_json import Generated, Ledger
from formats.partial_work import StoredWork
from formats.rows import Rows

LOG = logging.getLogger("consolidate")

_DRY_BATCHES = 3


class Sample(NamedTuple):
    """Texts that a model generated, how they were, and the pass over them to be saved."""

    examples: TextExamples
    record: Generated
    kept: KeptPass


def _refuse_existing(path: Path) -> None:
    raise InputError(
        f"{path} already exists: delete it, name another file with --save-generated, or replace it "
        "with --overwrite"
    )


def generate_sample(
    model: Model,
    plan: Texts,
    prompts: Rows,
    options: Generation,
    estimation: Estimation,
    *,
    work: KeptWork,
    found: StoredWork | None,
    digests: bool = True,
    overwrite: bool = False,
) -> Sample:
    """Generate the texts of a plan, resuming from saved progress, and write them if asked.

    The estimation is that of `settled_on_texts`. A file with other content is not replaced unless
    `overwrite` says so.
    """
    file = None if options.save_generated is None else Path(options.save_generated)
    if file is not None and file.exists() and found is None and not overwrite:
        _refuse_existing(file)
    group, start = all_processes(), kept_texts(found)
    before = 0 if start is None else len(start.texts)
    if before:
        LOG.info("resuming after %d of %d generated texts", before, len(plan.prompts))
    began = time.perf_counter()
    with (
        signals.waiting(),
        progress(
            "generating", len(plan.prompts), "texts", before=before, phase="generation"
        ) as advance,
    ):
        written = generate(
            model,
            plan,
            group=group,
            start=start,
            keep=lambda written: keep_texts(work, written, len(plan.prompts)),
            note=LOG.info,
            progress=advance,
        )
    texts = plan.in_order(written)
    _log(written, before, time.perf_counter() - began)
    if file is not None and is_first(group):
        lines = json_lines(model, prompts, texts)
        if file.exists() and not overwrite and file.read_text(encoding="utf-8") != lines:
            _refuse_existing(file)
        write_file(file, lines)
    sampled = estimation.estimator in ("mc", "batched")
    record = Generated(
        sequences=len(texts),
        max_length=plan.distribution.most,
        temperature=plan.distribution.temperature,
        top_p=plan.distribution.top_p,
        seed=plan.distribution.seed,
        prompts=prompts.digest() if digests and len(prompts) else None,
        label_draws=estimation.mc_samples if sampled else None,
        batch_size=plan.batch_size,
        halvings=written.halvings,
    )
    kept = KeptPass(work, found, *texts_to_keep(written))
    return Sample(examples_of(model, plan, texts), record, kept)


def first_texts(model: Model, plan: Texts) -> tuple[TextExamples, float]:
    """Generate the first few texts of a plan; give them, and the seconds that all would take."""
    few = plan.first(plan.batch_size * _DRY_BATCHES)
    began = time.perf_counter()
    texts = few.in_order(generate(model, few))
    each = (time.perf_counter() - began) / len(texts)
    return examples_of(model, few, texts), each * len(plan.prompts)


def generated_of(ledger: Ledger) -> GeneratedResult | None:
    """Report how the texts of a ledger's last task were generated; None where it has data."""
    record = ledger.tasks[-1].generated
    return None if record is None else cast(GeneratedResult, asdict(record))


def _log(written: Written, before: int, seconds: float) -> None:
    new = sum(map(len, written.texts[before:]))
    LOG.info(
        "generated %d texts, %d tokens (%.3g tokens/s)",
        len(written.texts),
        sum(map(len, written.texts)),
        new / seconds,
    )
