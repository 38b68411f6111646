"""Benchmarks: a language model in memory, scored on a task of EleutherAI's evaluation harness."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed import ProcessGroup

from consolidate.data.benchmark_files import (
    benchmark_content,
    harness_version,
    local_data_files,
    task_config,
    task_path,
)
from consolidate.data.benchmark_harness import BACKENDS, Share, harness_model, harnessed
from consolidate.estimation.batches import eval_mode
from consolidate.models.model import Model
from consolidate.runtime import signals
from consolidate.runtime.distributed import from_first, summed
from formats.benchmark import benchmark_task, is_task_file
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_json import BenchmarkRecord
from formats.wording import did_you_mean, few

LOG = logging.getLogger("consolidate")

MINUS = "minus "
"""Start of the name of a score that is a metric with its sign changed."""


@dataclass(eq=False)
class Benchmark:
    """A task of the harness, or a group of tasks with an aggregate, and what is its score."""

    data: str  # as given: lm-eval:TASK
    record: BenchmarkRecord
    loaded: Mapping[str, Any]  # tasks and groups, as the harness holds them
    seed: int

    def __len__(self) -> int:
        """Return the number of examples that are scored."""
        return self.record.examples

    def check(self, model: Model) -> None:
        """Refuse a model that the harness cannot score."""
        if model.objective.name not in BACKENDS:
            raise UsageError(
                f"{self.data} needs a language model (causal-lm or seq2seq-lm), and this one is "
                f"for {model.objective.name}: evaluate it on rows instead"
            )
        if model.processor is None or not hasattr(model.module, "generate"):
            raise UsageError(
                f"{self.data} needs a model of transformers with its tokenizer: "
                f"{model.checkpoint.path} has none"
            )

    def measure(
        self,
        model: Model,
        *,
        batch_size: int,
        progress: Callable[[int], None] = lambda count: None,
        group: ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Score a model; its modes, its tokenizer and the state of random generators are restored.

        Processes share the requests to the model, and all get the metrics over all.

        Args:
            model: A language model, as `check` accepts it.
            batch_size: Requests at a time.
            progress: Called with a number of examples, in all `len(self)`.
            group: The processes, each with the whole model.

        Returns:
            The metrics by the harness's names, and ``score``, the one that ``record.metric`` names.
        """
        done = Share(len(self), progress)
        with harnessed(self.data, self.seed, model.module), eval_mode(model.module):
            metrics = self._run(model, batch_size, done, group)
        done.finish()
        metrics = from_first(metrics, group)  # a task's own code may differ between processes
        signals.stop_together(*summed(group, *signals.wishes()))
        negated = self.record.metric.startswith(MINUS)
        name = self.record.metric.removeprefix(MINUS)
        if name not in metrics:
            raise InputError(f"{self.data} reports no {name} (found {few(list(metrics), 5)})")
        if not math.isfinite(metrics[name]):
            raise NonFiniteError(f"{self.data}: {name} is {metrics[name]}")
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        return {**finite, "score": -finite[name] if negated else finite[name]}

    def _run(
        self, model: Model, batch_size: int, done: Share, group: ProcessGroup | None
    ) -> dict[str, float]:
        """Run the harness, and give the metrics of the task or group."""
        from lm_eval.evaluator import evaluate

        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(self.seed)
        found = evaluate(
            lm=harness_model(model, done, batch_size, group),
            task_dict=self.loaded,
            limit=self.record.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        numbers = {
            key.removesuffix(",none"): value
            for key, value in found["results"][self.record.task].items()
            if key not in ("name", "alias", "sample_len", "sample_count")
            and "_stderr" not in key
            and isinstance(value, Real)
        }
        return {key: float(value) for key, value in numbers.items()}


def open_benchmark(data: str | Path, *, limit: int | None, seed: int) -> Benchmark:
    """Open ``lm-eval:TASK``: the name of a task of the harness, or the path of a task file.

    A task file can name functions, which are imported: it is code of whoever wrote it.
    """
    content, name = benchmark_content(data), str(benchmark_task(data))
    with harnessed(data, seed):
        loaded = _load_file(data) if is_task_file(name) else _load_named(data, name)
        tasks, groups = list(loaded["tasks"].values()), list(loaded.get("groups", {}).values())
        for task in tasks:
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        whole = groups[0] if groups else tasks[0]
        lengths = [len(task.eval_docs) for task in tasks]
        record = BenchmarkRecord(
            harness=content["harness"],
            task=whole.name if groups else whole.task_name,
            version=_version(whole.version if groups else whole.VERSION),
            metric=_score_of(data, tasks, groups[0] if groups else None),
            examples=sum(length if limit is None else min(limit, length) for length in lengths),
            limit=limit,
            digest=content.get("digest"),
        )
    LOG.info(
        "%s: %d examples, the score is %s (lm-eval %s)",
        data,
        record.examples,
        record.metric,
        record.harness,
    )
    return Benchmark(str(data), record, loaded, seed)


def _load_file(data: str | Path) -> Mapping[str, Any]:
    """Load a task file alone, with its local data wherever the current folder is."""
    from lm_eval.tasks import TaskManager

    path = task_path(data)
    config = task_config(path)
    if "group" in config and "class" not in config:
        raise InputError(
            f"{data} is a group, which lm-eval reads by name alone: name the file of one task"
        )
    manager = TaskManager(include_defaults=False)
    loaded: Mapping[str, Any]
    if (files := local_data_files(config, path)) is None:
        loaded = manager.load([str(path)])
        return loaded
    with TemporaryDirectory() as folder:
        over = Path(folder) / path.name
        options = config["dataset_kwargs"] | {"data_files": files}
        over.write_text(json.dumps({"include": str(path.resolve()), "dataset_kwargs": options}))
        loaded = manager.load([str(over)])
    return loaded


def _load_named(data: str | Path, name: str) -> Mapping[str, Any]:
    manager = _all_tasks()
    if name not in manager.all_tasks:
        hint = did_you_mean(name, manager.all_tasks) or "a task file ends in .yaml"
        raise InputError(f"{data}: lm-eval {harness_version(data)} has no task {name!r}; {hint}")
    if name in manager.all_tags:
        several = sorted(manager.task_index[name].tags)
        raise InputError(f"{data} stands for several tasks: name one of {few(several, 5)}")
    loaded: Mapping[str, Any] = manager.load([name])
    return loaded


@cache
def _all_tasks() -> Any:
    """Return the index of the harness's tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _version(value: object) -> str | None:
    return None if value in (None, "Yaml", "N/A") else str(value)


def _score_of(data: str | Path, tasks: Sequence[Any], group: Any) -> str:
    """Name the score: the first metric for which higher is better, else minus the first one."""
    higher = {name: better for task in tasks for name, better in task.higher_is_better().items()}
    if group is None:
        listed = list(higher)
    elif group.has_aggregation:
        listed = [one.metric for one in group.aggregate_metric_list]
    else:
        raise InputError(
            f"{data} is a group without an aggregate: name one of its tasks "
            f"({few(group.child_names, 5)})"
        )
    for better, sign in ((True, ""), (False, MINUS)):
        for name in listed:
            if higher.get(name) is better:
                first = _filters(tasks[0], group, name)[0]
                return f"{sign}{name}" if first == "none" else f"{sign}{name},{first}"
    raise InputError(
        f"{data}: higher_is_better is not known for {few(listed, 5) or 'any metric'}: set it in "
        "the task's metric_list"
    )


def _filters(task: Any, group: Any, metric: str) -> list[str]:
    """List the filters of a metric in the order of their results."""
    for one in () if group is None else group.aggregate_metric_list:
        if one.metric == metric and one.filter_list:
            return list(one.filter_list)
    names = [one["name"] for one in task.get_config("filter_list") or ()] or ["none"]
    return names if group is None else sorted(names)
