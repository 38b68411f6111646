"""EleutherAI's evaluation harness, run on a model in memory: silenced, seeded, requests shared."""

import copy
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.constants import is_offline_mode
from torch.distributed import ProcessGroup

from consolidate.estimation.batches import out_of_memory
from consolidate.models.model import Model
from consolidate.runtime.distributed import is_lost, place_in
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.errors import ConsolidateError, InputError, NetworkError, UsageError, install
from formats.hub_errors import explain, limit_waiting
from formats.wording import first_line

BACKENDS = {"causal-lm": "causal", "seq2seq-lm": "seq2seq"}
"""What the harness calls the objectives that it can score."""


class Share:
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

    def __init__(self, model: Model, done: Share) -> None:
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


def harness_model(model: Model, done: Share, batch_size: int, group: ProcessGroup | None) -> Any:
    """Make the harness's model of ours; processes share the requests and get all answers."""
    from lm_eval.models.huggingface import HFLM

    number, size = place_in(group)
    seen, tokenizer = _Module(model, done), copy.deepcopy(model.processor)
    backend = BACKENDS[model.objective.name]

    def shared(answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        count = len(requests)
        own = requests[count * number // size : count * (number + 1) // size]
        done.expect(len(own))
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
def harnessed(data: str | Path, seed: int, module: Any = None) -> Iterator[None]:
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
            stack.enter_context(torch.cuda.device(device))
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
            if is_offline_mode():
                return InputError(f"{data}: {meaning}: name a local task file")
            return NetworkError(f"{data}: {meaning}; try again, or name a local task file")
        cause = cause.__cause__ or cause.__context__
    return InputError(f"{data}: lm-eval fails with {type(error).__name__}: {first_line(error)}")
