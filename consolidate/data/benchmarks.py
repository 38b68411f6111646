"""Benchmarks: a language model in memory, scored on a task of EleutherAI's evaluation harness."""

import copy
import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from consolidate.data.benchmark_files import (
    benchmark_content,
    harness_version,
    local_data_files,
    task_config,
    task_path,
)
from consolidate.estimation.batches import eval_mode, out_of_memory
from consolidate.models.model import Model
from consolidate.runtime import signals
from consolidate.runtime.distributed import (
    from_first,
    is_lost,
    place_in,
    summed,
)
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.benchmark import benchmark_task, is_task_file
from formats.errors import (
    ConsolidateError,
    InputError,
    NetworkError,
    NonFiniteError,
    UsageError,
    install,
)
from formats.fisher_json import BenchmarkRecord
from formats.hub_errors import explain, limit_waiting
from formats.wording import did_you_mean, few, first_line

LOG = logging.getLogger("consolidate")

_BACKENDS = {"causal-lm": "causal", "seq2seq-lm": "seq2seq"}
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
        if model.objective.name not in _BACKENDS:
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
        done = _Share(len(self), progress)
        with _harness(self.data, self.seed, model.module), eval_mode(model.module):
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
        self, model: Model, batch_size: int, done: "_Share", group: ProcessGroup | None
    ) -> dict[str, float]:
        """Run the harness, and give the metrics of the task or group."""
        from lm_eval.evaluator import evaluate

        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(self.seed)
        seen = _Module(model, done)
        backend = _BACKENDS[model.objective.name]
        harness = _harness_model(seen, copy.deepcopy(model.processor), backend, batch_size, group)
        found = evaluate(
            lm=harness,
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
    with _harness(data, seed):
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


class _Share:
    """Turns requests that were answered into a share of the examples."""

    def __init__(self, examples: int, progress: Callable[[int], None]) -> None:
        self._examples, self._progress = examples, progress
        self._requests = self._answered = self._reported = 0
        self._streams = sys.stdout, sys.stderr

    def expect(self, requests: int) -> None:
        """Count requests that are to be answered."""
        self._requests += requests

    def answered(self, requests: int) -> None:
        """Report progress, where the harness is silenced."""
        self._answered += requests
        share = min(1.0, self._answered / max(1, self._requests))
        with redirect_stdout(self._streams[0]), redirect_stderr(self._streams[1]):
            self._report(int(share * self._examples))

    def finish(self) -> None:
        """Report what was answered without the model, from equal requests."""
        self._report(self._examples)

    def _report(self, examples: int) -> None:
        if examples > self._reported:
            self._progress(examples - self._reported)
            self._reported = examples


class _Module:
    """The module as the harness sees it: no torch module, so that it changes neither mode nor ties.

    Generation follows the checkpoint's generation_config.json, as in transformers.
    """

    def __init__(self, model: Model, done: _Share) -> None:
        self._module: Any = model.module
        self.done = done
        self._settings: dict[str, Any] = {}
        folder = model.checkpoint.path
        if (folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            self._settings["generation_config"] = GenerationConfig.from_pretrained(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        outputs = self._module(*inputs, **named)
        self.done.answered(len(outputs.logits))
        return outputs

    def generate(self, **named: Any) -> Any:
        outputs = self._module.generate(**self._settings, **named)
        self.done.answered(len(outputs))
        return outputs


def _harness_model(
    seen: _Module, tokenizer: Any, backend: str, batch_size: int, group: ProcessGroup | None
) -> Any:
    """Make the harness's model of ours; processes share the requests and get all answers."""
    from lm_eval.models.huggingface import HFLM

    number, size = place_in(group)

    def shared(answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        count = len(requests)
        own = requests[count * number // size : count * (number + 1) // size]
        seen.done.expect(len(own))
        answers = answer(own) if own else []
        if group is None:
            return answers
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, answers, group=group)
        return [one for part in parts for one in part]

    class InMemory(HFLM):
        def loglikelihood(self, requests: Any, **options: Any) -> Any:
            return shared(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
            return shared(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, **options: Any) -> Any:
            return shared(super().generate_until, requests)

    return InMemory(pretrained=seen, tokenizer=tokenizer, backend=backend, batch_size=batch_size)


@contextmanager
def _harness(data: str | Path, seed: int, module: Any = None) -> Iterator[None]:
    """Silence and seed the harness for a block, restore what it changes, explain what it raises."""
    limit_waiting()
    device = next(module.parameters()).device if module is not None else torch.device("cpu")
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        if device.type == "cuda":
            stack.enter_context(torch.random.fork_rng(devices=[device]))
            torch.cuda.manual_seed(seed)
        stack.enter_context(untouched_randomness(seed))
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        except Exception as error:
            if isinstance(error, ConsolidateError) or out_of_memory(error) or is_lost(error):
                raise
            raise _explained(data, error) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _explained(data: str | Path, error: Exception) -> ConsolidateError:
    """Translate an error of the harness, or of the task's own code."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return UsageError(
            f"{data}: {first_line(error)}: install it, or all of lm-eval: {install('lm-eval')}"
        )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(meaning := explain(cause), NetworkError):
            return NetworkError(f"{data}: {meaning}; try again, or name a local task file")
        cause = cause.__cause__ or cause.__context__
    return InputError(f"{data}: lm-eval fails with {type(error).__name__}: {first_line(error)}")
