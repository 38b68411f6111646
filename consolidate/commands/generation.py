"""Texts that a language model generates to measure its Fisher on: progress and records."""

import hashlib
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import cast

from consolidate.chain.resume import KeptPass, KeptWork, keep_texts, kept_texts, texts_to_keep
from consolidate.commands.generation_options import refuse_texts
from consolidate.data.generation import examples_of, generate, json_lines
from consolidate.data.text_examples import TextExamples
from consolidate.data.text_plan import TextPlan
from consolidate.models.model import Model
from consolidate.models.sampling import Written
from consolidate.options import Estimation, FisherOptions, Generation
from consolidate.results import Generated as GeneratedResult
from consolidate.results import GenerationCost
from consolidate.runtime import signals
from consolidate.runtime.distributed import all_processes, is_first
from consolidate.runtime.progress import progress
from formats.atomic import write_file
from formats.errors import UsageError
from formats.fisher_json import Generated, Ledger
from formats.partial_work import StoredWork
from formats.rows import Rows, file_digest

LOG = logging.getLogger("consolidate")

_DRY_BATCHES = 3


def has_texts(options: FisherOptions, ledger: Ledger) -> bool:
    """Return whether the file for the texts, if one is named, has those of a ledger's last task.

    Other content is refused unless it may be replaced.
    """
    generated, named = ledger.tasks[-1].generated, options.generation.save_generated
    if named is None:
        return True
    if generated is None or generated.texts is None:
        LOG.info("%s exists, and is left as it is: no digest of the texts was stored", named)
        return True
    if file_digest(Path(named)) == generated.texts:
        return True
    if not options.saving.overwrite:
        refuse_texts(Path(named))
    LOG.info("%s has other texts than the Fisher was measured on: measuring again", named)
    return False


def generate_sample(
    model: Model,
    plan: TextPlan,
    prompts: Rows,
    options: Generation,
    estimation: Estimation,
    *,
    work: KeptWork,
    found: StoredWork | None,
    digests: bool,
    overwrite: bool,
) -> tuple[TextExamples, Generated, KeptPass]:
    """Generate the texts of a plan, resuming from saved progress, and write them if asked.

    The estimation is that of `settled_on_texts`. A file with other content is not replaced unless
    `overwrite` says so. Give the texts, how they were generated, and the pass over them.
    """
    file = None if options.save_generated is None else Path(options.save_generated)
    if file is not None and model.processor is None:
        raise UsageError(
            f"--save-generated {file}: {model.checkpoint.path} has no tokenizer that makes texts "
            "of tokens: save it beside the weights, or leave the option out"
        )
    if file is not None and file.exists() and found is None and not overwrite:
        refuse_texts(file)
    group, start = all_processes(), kept_texts(found)
    before = 0 if start is None else len(start.texts)
    if before:
        LOG.info("resuming after %d of %d generated texts", before, plan.count)
    began = time.perf_counter()
    with (
        signals.waiting(),
        progress("generating", plan.count, "texts", before=before, phase="generation") as advance,
    ):
        written = generate(
            model,
            plan,
            group=group,
            start=start,
            keep=lambda written: keep_texts(work, written, plan.count),
            note=LOG.info,
            progress=advance,
        )
    texts = plan.in_order(written)
    _log(written, before, time.perf_counter() - began)
    lines = "" if model.processor is None else json_lines(model, prompts, texts)
    if file is not None and is_first(group):
        if file.exists() and not overwrite and file.read_text(encoding="utf-8") != lines:
            refuse_texts(file)
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
        texts=hashlib.sha256(lines.encode()).hexdigest() if digests and lines else None,
    )
    kept = KeptPass(work, found, *texts_to_keep(written))
    return examples_of(model, plan, texts), record, kept


def first_texts(model: Model, plan: TextPlan) -> tuple[TextExamples, GenerationCost]:
    """Generate the first few texts of a plan; give them, and what all would take."""
    few = plan.first(plan.batch_size * _DRY_BATCHES)
    began = time.perf_counter()
    written = generate(model, few)
    each = (time.perf_counter() - began) / few.count
    assert written.changed is not None  # the first batch was read again
    cost: GenerationCost = {
        "generation_seconds": each * plan.count,
        "generation_changed": written.changed,
    }
    return examples_of(model, few, few.in_order(written)), cost


def generated_of(ledger: Ledger) -> GeneratedResult | None:
    """Report how the texts of a ledger's last task were generated; None where it has data."""
    record = ledger.tasks[-1].generated
    return None if record is None else cast(GeneratedResult, asdict(record))


def _log(written: Written, before: int, seconds: float) -> None:
    new = sum(map(len, written.texts[before:]))
    rate = f" ({new / seconds:.3g} tokens/s)" if new else ""
    tokens = sum(map(len, written.texts))
    LOG.info("generated %d texts, %d tokens%s", len(written.texts), tokens, rate)
    if written.changed is not None:
        share = 100 * written.changed
        LOG.info("another batch size would change at most about %.3g%% of them", share)
