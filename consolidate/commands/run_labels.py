"""The labels of a run's tasks and the heads that they will meet, compared before any training."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from consolidate.chain.heads import refuse_lacking
from consolidate.data.columns import columns_of
from consolidate.data.labels import label_names, label_values, lacking_labels
from consolidate.models.architectures import labels_of_config, lacks_head
from consolidate.models.objectives import get_objective, settled_objective
from consolidate.options import FinetuneOptions
from formats.checkpoint import Checkpoint
from formats.task_file import open_task


def check_labels_of_run(
    start: Checkpoint,
    tasks: Mapping[str, FinetuneOptions],
    located: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Refuse a task with labels that its head will lack, as far as names tell beforehand.

    The names are those of the start's ``config.json``, until a task's data name others.

    Args:
        start: The checkpoint that the first task is trained on.
        tasks: The tasks that are trained, by their places in the run file.
        located: Begins the messages of errors with such a place.
    """
    known = labels_of_config(start.config)
    factory = any(options.source.model for options in tasks.values())
    name = settled_objective(start.config, factory)
    first = True
    for place, options in tasks.items():
        task_file, rows = open_task(options.data, split=options.encoding.split)
        name = options.source.objective or task_file.objective or name
        if name is None or not get_objective(name, factory=bool(options.source.model)).has_labels:
            return
        if name == "multi-label":  # a row of zeros and ones has no names
            return
        columns, head = columns_of(options.encoding.columns, task_file.columns()), options.head.head
        with located(place):
            if first and not options.source.model and lacks_head(start, name):
                known = label_names(rows, name, columns)
            elif head == "new":
                known = label_values(rows, name, columns)
            elif known is not None:
                found = label_values(rows, name, columns, used=True)
                if head == "keep":
                    refuse_lacking(rows, name, columns, found, known)
                known = [*known, *lacking_labels(found, known)]
        first = False
