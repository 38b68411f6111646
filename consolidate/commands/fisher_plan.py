"""What a measurement is about to do: options checked, checkpoint, its Fisher and data opened."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from consolidate.chain.elsewhere import Origin, open_origin, refuse_untrained
from consolidate.chain.factors import check_continued, check_structure, settled_structure
from consolidate.chain.fingerprint import Inputs
from consolidate.chain.fitted_chain import pending_task
from consolidate.chain.opening import stored_fisher, with_base
from consolidate.chain.output import check_output
from consolidate.chain.tasks import settled_merging, task_name
from consolidate.chain.up_to_date import Output, find_output
from consolidate.commands.generation_options import open_source, refuse_texts
from consolidate.data.columns import columns_of
from consolidate.options import Columns, FisherOptions, Merging
from formats.atomic import partial_path, recover
from formats.checkpoint import Checkpoint, open_checkpoint
from formats.checkpoint_files import check_link
from formats.digest import json_digest
from formats.errors import ConsolidateError, InputError, NonFiniteError, UsageError
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.fisher_json import TaskRecord, read_ledger
from formats.hub import FISHER, VALUES, find_local, locate
from formats.rows import file_digest
from formats.tensors import dtype_of

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Plan(Inputs):
    """What a pass will do, after every refusal that needs no model."""

    options: FisherOptions
    folder: Path  # of the checkpoint
    there: Output | None  # output at the target with a record of what it was made from
    origin: Origin | None = None  # what another program trained the checkpoint from
    completes: bool = False  # the last task of the chain is the one to measure
    alone: Path | None = None  # where the Fisher goes, if neither beside its weights nor with them

    @property
    def in_place(self) -> bool:
        """Whether the Fisher is written into its own checkpoint."""
        return self.options.output_dir is None

    @property
    def output(self) -> Path:
        """The checkpoint that the Fisher is written to."""
        return self.folder if self.in_place else Path(str(self.options.output_dir))

    @property
    def target(self) -> Path:
        """The folder that is made or replaced."""
        beside = self.output / "fisher" if self.in_place else self.output
        return self.alone or beside

    @property
    def replaces(self) -> bool:
        """Whether an existing Fisher is replaced by one that has its tasks too."""
        return (
            self.options.saving.overwrite
            or self.alone is not None
            or (self.in_place and (self.options.add or self.completes))
        )

    @property
    def columns(self) -> Columns:
        """The columns of the data by role."""
        return columns_of(self.options.encoding.columns, self.task_file.columns())

    @property
    def task(self) -> str:
        """The task's name."""
        others = None if self.completes else self.before
        if self.origin is not None:
            others = self.origin.stored
        return task_name(self.options.task or self.task_file.name, self.rows.name, others)

    @property
    def earlier(self) -> list[TaskRecord]:
        """The tasks before this one."""
        if self.origin is not None:
            return self.origin.stored.ledger.tasks
        return self.tasks[:-1] if self.completes else self.tasks

    def description(self, tasks: Sequence[TaskRecord]) -> dict[str, Any]:
        """Describe all that the result is made from, given the tasks before it."""
        name = task_name(self.options.task or self.task_file.name, self.rows.name, None)
        content = self.content(None) | {"fisher": [asdict(task) for task in tasks]}
        if self.origin is not None:
            content["after"] = file_digest(self.origin.stored.folder / LEDGER_NAME)
        return self.describe(self.options, content, task=name, dtype=self.options.dtype)

    def expected_description(self) -> dict[str, Any]:
        """Describe what an existing output would be made from."""
        added = self.in_place and self.options.add and not self.completes
        earlier = self.earlier[:-1] if added else self.earlier  # its own task is the last
        return self.description(earlier)

    def made_from(self) -> str:
        """Give the digest of what an existing output would be made from."""
        return json_digest(self.expected_description())

    def without_module(self) -> dict[str, Any]:
        """Describe the same without the module, which saved progress describes as it is loaded."""
        return {key: value for key, value in self.expected_description().items() if key != "module"}

    def check_target(self) -> None:
        """Refuse an existing target that must not be replaced."""
        whole = not self.in_place
        if not whole:
            check_link(self.folder, self.folder / "fisher")  # which readers refuse
        check_output(self.target, self.source, overwrite=self.replaces, whole=whole)
        texts = self.options.generation.save_generated
        if texts is None or self.options.saving.overwrite or not Path(texts).exists():
            return
        if not partial_path(self.target).exists():  # which resumes with the same texts
            refuse_texts(Path(texts))

    def afresh(self) -> "Plan":
        """Give the plan without a task that turned out to be measured already."""
        if not self.completes or pending_task(self.before) is not None:
            return self
        merging = settled_merging(None, self.options.merging)
        structure = settled_structure(self.options.curvature.structure, None)
        return replace(self, before=None, merging=merging, structure=structure, completes=False)


def find_checkpoint(options: FisherOptions) -> Path:
    """Find the checkpoint's folder, after refusing options that contradict each other."""
    in_place = options.output_dir is None
    if options.after is not None and options.add:
        raise UsageError(
            "--after cannot be combined with --add: merge with the tasks of one checkpoint"
        )
    if in_place and options.add and options.saving.overwrite:
        raise UsageError(
            "--add cannot be combined with --overwrite: add to the Fisher or replace it"
        )
    checkpoint = options.checkpoint
    without = FISHER if options.after is not None else () if options.add else VALUES
    absent = in_place and not find_local(checkpoint).exists()
    only = ("config.json",) if absent else None  # a name that is wrong is refused as such
    folder = locate(checkpoint, options.source.revision, only=only, without=without)
    if absent or (in_place and not folder.is_dir()):
        raise UsageError(
            f"{checkpoint} is not a local folder: name the folder to write to with --output-dir"
        )
    return folder


def plan_fisher(options: FisherOptions, folder: Path, *, again: bool = False) -> Plan:
    """Open a checkpoint, its Fisher and the data, and refuse what would fail later.

    With `again` it is not checked whether the output is up to date, nor, in a dry run, its target.
    """
    source = with_base(open_checkpoint(folder), options.source.base_model)
    options = _in_float32(options, source)
    output = folder if options.output_dir is None else Path(options.output_dir)
    there = None if again or options.dry_run else find_output(output)
    task_file, rows = open_source(options)
    name = task_name(options.task or task_file.name, rows.name, None)
    recover(folder / "fisher")
    last = None if options.after is not None else _last_task(folder)
    # In place, one that was measured since may be up to date.
    completes = last is not None and _completes(last, name, options, again=again)
    if last is not None and not last.measured:
        if completes and options.generation.generate is not None:
            raise UsageError(
                f"{last.name} was trained on data and is measured on data, not by --generate: give "
                "--data, or another --task"
            )
        if completes:
            _refuse_merging(options, last)
        else:
            _refuse_beside_unmeasured(options, last, name)
    if completes:  # of the Hub the ledger alone is there
        locate(options.checkpoint, options.source.revision)
    before = _stored_before(folder, source, options, completes=completes)
    if completes and before is None:
        completes = False
    elif before is None and options.output_dir is not None and last is not None:
        left = [task.name for task in read_ledger(folder / "fisher" / LEDGER_NAME).tasks]
        if name not in left:
            note = "the output's Fisher is that of %s alone: --add keeps that of %s too"
            LOG.info(note, name, ", ".join(left))
    origin = None
    if options.after is not None:
        origin = open_origin(options.after, source, options.source.base_model)
    asked = Merging() if completes else options.merging
    chain = before if origin is None else origin.stored
    structure = _settled_structure(options, chain, completes=completes)
    plan = Plan(
        source=source,
        before=before,
        task_file=task_file,
        rows=rows,
        merging=settled_merging(chain, asked),
        structure=structure,
        options=options,
        folder=folder,
        there=there,
        origin=origin,
        completes=completes,
    )
    if origin is not None:
        refuse_untrained(origin, plan.records, source.path)
    if there is None and not (again and options.dry_run):
        try:
            plan.check_target()
        except InputError as error:
            if not options.dry_run:
                raise
            LOG.info("without --dry-run this would be refused: %s", error)
    return plan


def plan_alone(
    options: FisherOptions, source: Checkpoint, before: StoredFisher | None, folder: Path
) -> Plan:
    """Plan to measure, into a folder, what a training needs first, which has checked its options.

    That is the last task of a chain, which has no Fisher, or without a chain the model on texts
    that it generates.
    """
    options = _in_float32(options, source)
    task_file, rows = open_source(options)
    completes = before is not None
    return Plan(
        source=source,
        before=before,
        task_file=task_file,
        rows=rows,
        merging=settled_merging(before, Merging()),
        structure=_settled_structure(options, before, completes=completes),
        options=options,
        folder=source.path,
        there=None,
        completes=completes,
        alone=folder,
    )


def _settled_structure(
    options: FisherOptions, chain: StoredFisher | None, *, completes: bool
) -> str:
    """Choose the structure, and refuse one that the chain or another option excludes."""
    structure = settled_structure(options.curvature.structure, chain)
    check_structure(structure, options.estimation, options.parameters)
    if structure == "inputs" and not completes:
        check_continued(chain)
    return structure


def _in_float32(options: FisherOptions, source: Checkpoint) -> FisherOptions:
    """Measure float16 weights in float32 unless told, as small gradients are 0 in float16."""
    whole = [source] if source.base is None else [source, source.base]
    dtypes = [{dtype_of(one.weights, name) for name in one.weights} for one in whole]
    floats = [{dtype for dtype in found if dtype.is_floating_point} for found in dtypes]
    narrow = {torch.float16} in floats and torch.float64 not in set().union(*floats)
    if options.dtype is not None or not narrow:
        return options
    LOG.info("the weights are float16, in which small gradients are 0: measuring in float32")
    return replace(options, dtype="float32")


def _last_task(folder: Path) -> TaskRecord | None:
    """Give the last task of a checkpoint's ledger; None where there is no readable one."""
    path = folder / "fisher" / LEDGER_NAME
    try:
        return read_ledger(path).tasks[-1]
    except ConsolidateError as error:
        if path.is_file():  # in place it is refused later
            LOG.warning("the Fisher beside the weights is not read: %s", error)
        return None


def _completes(last: TaskRecord, name: str, options: FisherOptions, *, again: bool) -> bool:
    """Return whether the task to measure is the last of the ledger, which has no Fisher yet.

    Or had none: in place, one that was measured since may be up to date.
    """
    if last.name != name or last.penalty is None:
        return False
    return not last.measured or (options.output_dir is None and not options.add and not again)


def _stored_before(
    folder: Path, source: Checkpoint, options: FisherOptions, *, completes: bool
) -> StoredFisher | None:
    """Read the Fisher that is added to or completed.

    None without one; also for one to be completed that is not whole, or not of these weights, if
    it may be replaced.
    """
    if not (options.add or completes):
        return None
    try:
        return stored_fisher(folder / "fisher", source)
    except (InputError, NonFiniteError) as error:
        if not completes or options.output_dir is not None:
            raise
        if options.saving.overwrite:
            return None
        raise type(error)(f"{error}; --overwrite leaves out what is stored") from None


def _refuse_beside_unmeasured(options: FisherOptions, last: TaskRecord, name: str) -> None:
    """Refuse to write another task beside a task that is not measured, unless that was asked."""
    if options.output_dir is None and not (options.add or options.saving.overwrite):
        raise InputError(
            f"{options.checkpoint}: expected data of {last.name!r}, whose Fisher was not measured, "
            f"found a task {name!r}: --task {last.name} measures it; --add adds another, after "
            f"which {last.name} can no longer be measured"
        )


def _refuse_merging(options: FisherOptions, task: TaskRecord) -> None:
    """Refuse merge options for a task whose training has set them."""
    if options.merging != Merging():
        raise UsageError(
            f"--merge-rule, --gamma and --task-weight of {task.name} are those of its training: "
            "leave them out"
        )
