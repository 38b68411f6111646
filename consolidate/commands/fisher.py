"""What `consolidate fisher` does, without the command line: read, measure, write."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consolidate.chain.claims import claiming, refuse_changed
from consolidate.chain.fingerprint import (
    checkpoint_content,
    digest,
    module_content,
    options_content,
    plain,
    rows_content,
    versions,
)
from consolidate.chain.opening import stored_fisher, with_base
from consolidate.chain.output import bytes_of, check_output, output_bytes
from consolidate.chain.resume import SAVE_EVERY, KeptPass, KeptWork
from consolidate.chain.tasks import (
    Merging,
    add_task,
    check_names_to_be,
    merging_options,
    task_name,
)
from consolidate.chain.up_to_date import cached, find_output, recorded_fisher
from consolidate.commands.measurement import (
    estimator_options,
    fisher_summary,
    log_notes,
    measure_fisher,
    pass_cost,
)
from consolidate.data.columns import Columns, columns_of
from consolidate.data.encoding import encode
from consolidate.models.adapters import load
from consolidate.models.model import Model
from consolidate.runtime import shards
from consolidate.runtime.devices import best_device
from consolidate.runtime.distributed import (
    all_processes,
    as_one,
    from_first,
    is_first,
    place_in,
    shards_among,
)
from consolidate.views.output_card import renew_card
from formats.atomic import partial_path, replace_folder
from formats.checkpoint import (
    check_finite,
    open_checkpoint,
    weight_records,
    write_checkpoint,
)
from formats.digest import TensorRecord, set_digest
from formats.errors import ConsolidateError, InputError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    write_fisher,
)
from formats.fisher_json import TaskRecord, read_ledger
from formats.hub import FISHER, commits_of, locate
from formats.task_file import open_task

LOG = logging.getLogger("consolidate")


@as_one
def fisher(
    checkpoint: str | Path,
    data: str | Path,
    *,
    task: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    estimator: str | None = None,
    mc_samples: int | None = None,
    max_outcomes: int | None = None,
    max_examples: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    add: bool = False,
    overwrite: bool = False,
    output_dir: str | Path | None = None,
    revision: str | None = None,
    base_model: str | Path | None = None,
    data_digest: bool = True,
    check: bool = False,
    tolerance: float | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    dry_run: bool = False,
    save_every: float = SAVE_EVERY,
    restart: bool = False,
    force: bool = False,
    shard: bool = False,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
) -> dict[str, Any]:
    """Measure the Fisher diagonal of a checkpoint on a task's data and store it beside the weights.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: A file, a folder, a data set on the Hub, or a ``task.toml``.
        task: The task's name in the ledger; the data's name unless given.
        objective: What is predicted; the architecture's own unless given.
        model: ``package.module:factory`` for a model that transformers does not know.
        columns: Where the inputs and labels are in the data.
        split: Of a data set that has several.
        max_length: Tokens after which a text is truncated.
        pack: Fill sequences of `max_length` with consecutive texts (language modelling).
        estimator: ``exact``, ``mc``, ``empirical`` or ``batched``; ``exact`` up to 16 outcomes and
            ``mc`` beyond unless given.
        mc_samples: Labels drawn per example by ``mc`` and ``batched``; 1 unless given.
        max_outcomes: ``exact`` is refused above this many backward passes per example; 4096 unless
            given.
        max_examples: Measure on a seeded random subset of this size.
        batch_size: Examples read and run at a time; the result does not depend on it.
        seed: Of the subset, of the sampled labels and of masks.
        device: Such as ``cpu`` or ``cuda``; the best there is unless given.
        dtype: Of the weights during the pass; as stored unless given.
        freeze: Glob patterns of parameters that are left out.
        gradient_checkpointing: Layers keep only their inputs, and run again in the backward pass.
        add: Another task measured at the same weights is added to the Fisher that is there.
        overwrite: Replace the Fisher, or the output folder, that is there.
        output_dir: Write a whole checkpoint here instead of a Fisher into the folder.
        revision: Of a checkpoint on the Hub.
        base_model: Of a checkpoint that is an adapter of peft: a folder or a repository. The one
            that its config names unless given, if that is a folder here.
        data_digest: Keep the data's digest in the ledger.
        check: Hold every batch against single examples and autograd, not only the first.
        tolerance: Read in seeded random order and stop once the relative standard error of every
            parameter's trace is at most this, after 64 examples at the earliest.
        accumulate_dtype: Of the sums, and what gradients are squared in: float32 or float64.
        dry_run: Only say what the pass would take; nothing is written.
        save_every: Minutes between two times that a long pass is kept beside the target; the same
            call started again goes on from there.
        restart: Throw away what was kept of a pass.
        force: Measure anew, and replace the Fisher, even where that is there and was made from the
            same.
        shard: Each of several processes holds a shard of the weights and of the Fisher (FSDP2). The
            pass takes one example after the other.
        merge_rule: ``online`` or ``separate``: how the task is merged with those before it, and
            the next unless they say otherwise; as the one before, or ``online``, unless given.
        gamma: γ of ``online``, from 0 to 1; as before, or 1, unless given.
        task_weight: By which F is multiplied: a number, or relative to the first task ``units``
            (n_t/n_1) or ``trace`` (tr F_1 / tr F_t over common parameters).

    Returns:
        What was done: the folder, the task, counts, the Fisher's trace and how certain it is by
        parameter; with `dry_run`, what it would take. Where the Fisher is there, whole and made
        from the same, nothing is done, and the ``status`` is ``cached``.

    Raises:
        InputError: Something in the checkpoint or the data does not fit.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
    """
    given = dict(locals())
    group, cut = all_processes(), shards_among(shard=shard, check=check)
    in_place = output_dir is None
    for option, replaces in (("overwrite", overwrite), ("force", force)):
        if in_place and add and replaces:
            raise UsageError(
                f"--add and --{option} exclude each other: keep the Fisher or replace it"
            )
    overwrite = overwrite or force
    folder = locate(checkpoint, revision, without=() if add else FISHER)
    if in_place and (not folder.is_dir() or not Path(checkpoint).exists()):
        raise UsageError(f"{checkpoint} is no local folder: say where to write with --output-dir")
    target = folder / "fisher" if in_place else Path(str(output_dir))
    claim = claiming(folder, part="fisher") if in_place else claiming(target)
    with nullcontext() if dry_run else claim:
        source = with_base(open_checkpoint(folder), base_model)
        there = None if force or dry_run else find_output(folder if in_place else target)
        refuse = partial(
            check_output,
            target,
            source,
            overwrite=overwrite or (add and in_place),
            whole=not in_place,
        )
        if dry_run:
            try:
                refuse()
            except InputError as error:
                LOG.info("the pass itself would be refused: %s", error)
        elif there is None:
            refuse()
        before = stored_fisher(folder / "fisher", source) if add else None
        merge_rule, gamma = merging_options(before, merge_rule, gamma, task_weight)
        task_file, rows = open_task(data, split=split)
        data_content = cache(lambda: rows_content(task_file, rows))

        @cache
        def records() -> dict[str, TensorRecord]:
            # Those of a ledger have been compared with the weights.
            return weight_records(source.weights) if before is None else before.ledger.weights

        def made_from(tasks: Sequence[TaskRecord]) -> str:
            content = checkpoint_content(source, None, records())
            if source.base is not None:
                of_base = weight_records(source.base.weights)
                content["base"] = checkpoint_content(source.base, None, of_base)
            return digest(
                {
                    "command": "fisher",
                    "versions": versions(),
                    "checkpoint": content | {"fisher": [asdict(task) for task in tasks]},
                    "data": data_content(),
                    "module": module_content(model),
                    "options": options_content(given)
                    | {
                        "task": task_name(task or task_file.name, rows.name, None),
                        "device": best_device(device).type,
                        "merge_rule": merge_rule,
                        "gamma": gamma,
                        "processes": place_in(group)[1],
                    },
                }
            )

        tasks = [] if before is None else before.ledger.tasks
        if there is not None:
            earlier = tasks[:-1] if in_place else tasks
            if (done := cached(there, lambda: made_from(earlier))) is not None:
                return {
                    "status": "cached",
                    "checkpoint": str(there.checkpoint),
                    "fisher": str(there.folder),
                    "commits": commits_of(folder),
                    **recorded_fisher(done.ledger),
                }
            refuse()
        if not dry_run and is_first(group):
            records()  # of what is measured, whatever becomes of the files meanwhile
        check_finite(source.weights, folder)
        loaded = load(
            source,
            objective=objective or task_file.objective,
            factory=model,
            dtype=dtype,
            device="cpu" if cut else best_device(device),
            freeze=freeze,
            gradient_checkpointing=gradient_checkpointing,
        )
        check_names_to_be(before, loaded)
        name = task_name(task or task_file.name, rows.name, before)
        examples = encode(
            rows,
            loaded,
            columns=columns_of(columns, task_file.columns()),
            max_length=max_length,
            pack=pack,
            seed=seed,
        )
        if cut is not None and source.adapter is not None:
            raise UsageError("--shard cuts whole models, not adapters: leave it out")
        module = _module_digest(loaded)  # the same in shards, whose layers have other names
        if cut is not None:
            shards.shard(loaded.module, cut, best_device(device))
        options: dict[str, Any] = {
            **estimator_options(
                loaded,
                examples,
                estimator=estimator,
                mc_samples=mc_samples,
                max_outcomes=max_outcomes,
                check=check,
            ),
            "max_examples": max_examples,
            "batch_size": batch_size,
            "seed": seed,
            "tolerance": tolerance,
            "accumulate_dtype": accumulate_dtype,
        }
        if dry_run:
            cost = pass_cost(loaded, examples, group=group, **options)
            return {
                "status": "dry run",
                "task": name,
                **cost,
                "files": _file_sizes(cost["parameters"], {} if in_place else source.weights),
                "kept": {
                    partial_path(target).name: 2 * accumulate_dtype.itemsize * cost["parameters"]
                },
            }

        work = KeptWork(
            target,
            lambda: {
                "weights": set_digest(records()),
                "data": data_content()["digest"],
                "objective": loaded.objective.name,
                "model": model,
                "module": module,
                "base_model": None
                if source.base is None
                else set_digest(weight_records(source.base.weights)),
                "columns": asdict(columns_of(columns, task_file.columns())),
                "max_length": max_length,
                "pack": pack,
                "dtype": plain(dtype),
                "freeze": list(freeze),
                **options,
                "accumulate_dtype": plain(accumulate_dtype),
                "processes": place_in(group)[1],
                "shard": shard,
            },
            every=60 * save_every,
            result_bytes=output_bytes(source, whole=not in_place),
            restart=restart,
            group=group,
            shard=shard,
        )
        kept = KeptPass(work, work.start())
        diagonal = measure_fisher(
            loaded, examples, label=f"Fisher of {name}", kept=kept, group=group, **options
        )
        if not is_first(group):
            result = from_first(None, group)
            work.remove()
            return result
        log_notes(loaded, examples, diagonal)
        merged, anchor, ledger = add_task(
            before,
            loaded,
            source.weights,
            diagonal,
            records=records(),
            name=name,
            data=rows.name,
            data_digest=data_content()["digest"] if data_digest else None,
            made_from=made_from(tasks) if data_digest else None,
            merging=Merging(merge_rule, gamma, task_weight),
        )
        heads = None if before is None else before.heads
        if overwrite and (target / LEDGER_NAME).is_file():
            LOG.info("replacing the Fisher of %s", _task_names(target))
        with replace_folder(target, overwrite=overwrite or add) as staging:
            if in_place:
                write_fisher(staging, merged, ledger, anchor=anchor, heads=heads)
            else:
                write_checkpoint(staging, source, source.weights)
                # The card too, but for what we wrote in it: the model is the same.
                fisher_at = staging / "fisher"
                ledger = write_fisher(fisher_at, merged, ledger, anchor=anchor, heads=heads)
                renew_card(staging, ledger)
            refuse_changed(folder if in_place else staging, records(), folder)
        work.remove()
        result = {
            "status": "done",
            "checkpoint": str(folder if in_place else target),
            "fisher": str(target if in_place else target / "fisher"),
            "commits": commits_of(folder),
            **fisher_summary(ledger, diagonal),
        }
        return from_first(result, group)


def _task_names(folder: Path) -> str:
    try:
        ledger = read_ledger(folder / LEDGER_NAME)
        heads = f" and the output layers of {', '.join(ledger.heads)}" if ledger.heads else ""
        return ", ".join(task.name for task in ledger.tasks) + heads
    except ConsolidateError as error:
        return f"tasks unknown ({error})"


def _module_digest(model: Model) -> str:
    """Give a digest of what the module is made of, which its weights do not tell."""
    configs = [model.checkpoint.config, model.checkpoint.adapter]
    text = json.dumps(configs, sort_keys=True) + repr(model.module)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sizes(parameters: int, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Give the bytes of what a pass would leave, without headers and the ledger."""
    sizes = {"fisher.safetensors": 4 * parameters}
    if weights:
        sizes["model.safetensors"] = bytes_of(weights)
    return sizes
