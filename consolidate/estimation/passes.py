"""One pass over a dataset: squares of per-example gradients, and blocks, added batch by batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.estimation.batches import Batch, out_of_memory, place_of, placed
from consolidate.estimation.compensated_sums import Accumulators
from consolidate.estimation.example_gradients import MEASURED
from consolidate.estimation.gradient_methods import (
    Plan,
    add_gradients,
    choose_methods,
    method_of,
    recorded_blocks,
    requiring_gradients,
    slower,
)
from consolidate.estimation.input_blocks import BlockSums, InputBlock, with_partners
from consolidate.estimation.layer_hooks import Recorder, Recording, UnitError, add_squares, in_words
from consolidate.estimation.whole_batch import Doubt, MixedExamplesError, compare_rows, suspect_rows
from consolidate.runtime.devices import release_memory
from formats.errors import InputError


class Scores(NamedTuple):
    """What is backpropagated through the network."""

    forward: Callable[[Batch], Tensor]  # from a batch to the model's outputs
    vectors: Callable[[Tensor, Batch], Iterator[Tensor]]  # from detached outputs to ∇ log p there
    units: Callable[[Tensor], Tensor]  # from labels to the units of each example
    whole: bool  # whether gradients are summed over the batch before they are squared


class PartialPass(NamedTuple):
    """Where another pass over the same batches can resume."""

    tensors: dict[str, Tensor]  # the sums so far, and what was counted
    levels: dict[str, str] | None  # the parameters' methods; None while that is not known
    most: int | None  # examples that fit into memory; None while all do

    @property
    def examples(self) -> int:
        """How many examples have been added."""
        return int(self.tensors["counts"][1])


class Pass:
    """Σ over batches of the squares of per-example gradients, and of the products in blocks.

    A batch that runs out of memory is split in half. A batch that fails half way is undone,
    together with all others since the last fold, and added again.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        scores: Scores,
        dtype: torch.dtype,
        *,
        check: bool,
        note: Callable[[str], None] | None,
        start: PartialPass | None,
        group: ProcessGroup | None,
        blocks: Mapping[str, InputBlock],
    ):
        """Prepare to measure `parameters`, whose gradients are off, or to resume another pass.

        With `check` the methods are chosen again on every batch; `dtype` is that of the sums.
        `blocks` are those of `covered_layers`, which are measured too.
        """
        self.accumulators: Accumulators | None = None  # until the first batch
        self.levels: dict[str, str] | None = None  # the parameters' methods; likewise
        self._model = model
        self._parameters = dict(parameters)
        self._blocks = dict(blocks)
        self._scores = scores
        self._dtype = dtype
        self._check = check
        self._note = note or (lambda text: None)
        self._place = place_of(model)
        self._group = group
        self._plan: Plan | None = None
        self._verified = True  # whether the plan's batch was checked as a whole
        self._recorder: Recorder | None = None  # of what is marked in the plan
        self._watched: dict[str, nn.Parameter] = {}  # those that are not in the plan
        self._by_loop = self._parameters
        self._first: Batch | None = None
        self._most: int | None = None
        self._vectors = 0  # of the batch so far, each of which adds to every element
        self._since_fold: list[Batch] = []
        self._noted: set[str] = set()
        if start is not None:
            self.levels, self._most = start.levels, start.most
            self._accumulators().load(start.tensors)

    @property
    def examples(self) -> int:
        """How many examples have been added."""
        return 0 if self.accumulators is None else self.accumulators.examples

    def relative_errors(self, group: ProcessGroup | None = None) -> dict[str, float]:
        """Return the relative standard error of each trace that is not negligible, by name."""
        return self._accumulators().relative_errors(group)

    def sum_over_processes(self) -> None:
        """Add the sums of the other processes; no batch may be added after that."""
        if self._group is not None:
            self._accumulators().sum_over(self._group)

    def wait(self) -> None:
        """Let other processes add a batch when this one has none left."""

    def means(self, divisor: int) -> dict[str, Tensor]:
        """Return the sums over the divisor, by name; nothing may be added after that."""
        return self._accumulators().means(divisor)

    def block_means(self, divisor: int) -> dict[str, Tensor]:
        """Return the blocks' matrices over the divisor, by name; call it after `means`."""
        return self._accumulators().block_means(divisor)

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def see(self, batch: Batch) -> None:
        """Read a batch that the resumed pass has added, and on which it may have chosen methods."""
        if self._first is None and self.levels is not None and len(batch) > 1:
            self._first = batch.rows(0, max(self._most or len(batch), 2))

    def take(self, batch: Batch, keep: Callable[[PartialPass], None] | None = None) -> None:
        """Add a batch, on any device; raise where outputs or gradients are not finite.

        `keep` is called where another pass can resume; its argument is valid until it returns.
        """
        waiting = deque([batch])
        while waiting:
            batch = waiting.popleft()
            if self._most is not None and len(batch) > self._most:
                waiting.appendleft(batch.rows(self._most, len(batch)))
                batch = batch.rows(0, self._most)
            if self._added(batch):
                self._since_fold.append(batch)
            else:
                waiting.extendleft(reversed([*self._since_fold, batch]))
                self._since_fold.clear()
                if self.accumulators is not None:
                    self.accumulators.rewind()
            if self.accumulators is not None and self.accumulators.fold_if_due():
                self._since_fold.clear()
                if keep is not None:
                    keep(PartialPass(self.accumulators.tensors(), self.levels, self._most))

    def _added(self, batch: Batch) -> bool:
        """Add a batch; if it fails and a retry may succeed, prepare the retry and return false."""
        failed: set[str] = set()
        raised: str | None = None
        only_loop = False
        try:
            self._add(self._placed(batch))
            return True
        except UnitError as error:
            failed, raised = error.names, str(error)
        except MixedExamplesError as error:
            only_loop, raised = error.only_loop, error.refusal
            failed = {*(self.levels or {})} if only_loop else error.names
        except Exception as error:
            if not out_of_memory(error):
                raise
        # By now the traceback is freed, which refers to the graph.
        if failed:
            self._plan = None
            before = self.levels or {}
            level = before[min(failed)]  # Those of another, if any, fail again.
            failed = {n for n in failed if only_loop or before[n] == level}
            failed = with_partners(failed, self._blocks) & before.keys()
            lower = "loop" if only_loop else slower(level)
            self.levels = {n: lower if n in failed else v for n, v in before.items()}
            if only_loop and raised is not None:
                refused = f"the model refuses {len(batch)} examples ({raised})"
                self._note(f"{refused}: continuing by loop")
            else:
                now = lower.replace(" by itself", ", one example at a time")
                fallen = _fallen(method_of(level), raised, now, failed)
                self._note(f"batch {batch.number}: {fallen}")
        elif len(batch) == 1:
            raise InputError(
                f"batch {batch.number}: out of memory with a single example; shorten the examples, "
                "free memory, or use a smaller dtype or another device"
            )
        else:
            self._most = (len(batch) + 1) // 2
            self._first = None
            self._plan = self._plan if self._verified else None
            self._note(f"out of memory with {len(batch)} examples: continuing with {self._most}")
            release_memory(self._place.device)
        return False

    def _add(self, batch: Batch) -> None:
        if not self._scores.whole:
            self._choose_methods(batch)
        accumulators = self._accumulators()  # After the check, which takes as much memory.
        units, self._vectors = self._scores.units(batch.labels), 0
        if self._scores.whole:
            units = units.sum()[None]
            with requiring_gradients(self._parameters):
                traces = add_gradients(self._sums, self._parameters, *self._run(batch))
            additions = self._vectors
        else:
            traces, additions = self._add_examples(batch)
        accumulators.end_batch(traces, units, len(batch), where_in_data(batch), additions)

    def _choose_methods(self, batch: Batch) -> None:
        """Choose the methods on the pass's first batch; with `check` on each."""
        if self._plan is not None and not self._check:
            return
        if self._first is not None:
            batch = self._placed(self._first)
        if len(batch) > 1:
            forward, every = self._scores.forward, self._parameters
            plan = choose_methods(
                self._model, every, batch, forward, self._dtype, self.levels, self._blocks
            )
            self._verified = plan.alone is None or self._first is not None
            self._plan, self.levels, self._first = plan, plan.levels, None
            self.close()
            self._watched, self._by_loop = {}, every
            if plan.units:  # They stay marked until the next plan.
                self._recorder = Recorder(self._model, plan.units, self._dtype)
                self._watched = {n: p for n, p in every.items() if n not in plan.levels}
                self._by_loop = {n: p for n, p in every.items() if plan.levels.get(n) == "loop"}
            self._note_plan(plan)

    def _note_plan(self, plan: Plan) -> None:
        """Report the modules that do not use the method that was tried first, and why."""
        notes = []
        if (why := plan.only_single) is not None:
            notes = [f"the model accepts only one example at a time ({why}): continuing by loop"]
        names: dict[tuple[str, str | None, str], list[str]] = {}
        for name, (method, error) in plan.failures.items():
            if (now := method_of(plan.levels[name])) != method:
                names.setdefault((method, error, now), []).append(name)
        notes += [_fallen(*reason, of_reason) for reason, of_reason in names.items()]
        for note in notes:
            if note not in self._noted:  # With `check` there is a plan for every batch.
                self._noted.add(note)
                self._note(note)

    def _add_examples(self, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Add Σ_examples Σ_vectors (Jᵀ vector)²: what the plan marks at once, the rest one by one.

        Returns the total that each example added, by name, and the additions to an element.
        """
        rest, blocks = self._by_loop, self._blocks
        traces: dict[str, Tensor] = {}
        additions = 0
        if self._recorder is not None:
            doubt: Doubt | None = None
            with self._recorded(batch) as (recording, outputs):
                found = [*_dependencies(outputs, self._watched), *recording.mismatched]
                together = recorded_blocks(blocks, recording, [*rest, *found])
                blocks = {key: b for key, b in blocks.items() if key not in together}
                if outputs.requires_grad:
                    vectors = self._scores.vectors(outputs.detach(), batch)
                    first, sums = _first_measured(batch), self._block_sums(together)
                    keep = self._unverified
                    squares = add_squares(
                        self._sums, recording, outputs, vectors, first, sums, keep=keep
                    )
                    traces, additions = squares.traces, squares.additions
                    del vectors
                if self._unverified:
                    doubt = self._doubt(batch, recording, outputs, traces)
            del outputs  # The graph of a whole batch, before others are created.
            if doubt is not None:
                self._decide(batch, doubt)
            self._verified = True
            if found:
                rest = rest | {name: self._parameters[name] for name in found}
        if rest or blocks:
            squares_of = {name: self._sums[name] for name in rest}
            members = {
                name: self._parameters[name] for b in blocks.values() for name in b.parameters
            }
            sums = self._block_sums(blocks)
            with requiring_gradients(rest | members):
                each = [
                    add_gradients(squares_of, rest | members, *self._run(batch.example(i)), sums)
                    for i in range(len(batch))
                ]
            traces |= self._joined(each)
            additions = max(additions, self._vectors)
        return traces, additions

    @contextmanager
    def _recorded(self, batch: Batch) -> Iterator[tuple[Recording, Tensor]]:
        """Run a batch forward, and record it for a block."""
        assert self._recorder is not None
        watched = self._watched  # The first batch did not depend on them, but this one may.
        with (
            requiring_gradients(watched),
            self._recorder.recording(
                len(batch), only_marks_need_gradients=not watched
            ) as recording,
        ):
            try:
                outputs = self._scores.forward(batch)
            except (RuntimeError, InputError) as error:
                if not self._unverified or out_of_memory(error):
                    raise
                refusal = in_words(error)  # It accepts a few examples, but not so many.
                raise MixedExamplesError(only_loop=True, refusal=refusal) from error
            yield recording, outputs

    @property
    def _unverified(self) -> bool:
        """Whether the rows of a batch, on which methods were chosen, are still to be checked."""
        return self._plan is not None and not self._verified

    def _doubt(
        self, batch: Batch, recording: Recording, outputs: Tensor, traces: Mapping[str, Tensor]
    ) -> Doubt | None:
        assert self._plan is not None
        assert self._plan.alone is not None
        known, units = self._plan.alone, self._plan.units
        return suspect_rows(known, recording, outputs, batch.number, units, traces)

    def _decide(self, batch: Batch, doubt: Doubt) -> None:
        """Compare the rows that are in doubt; what was added is undone if they differ."""

        def alone(i: int) -> Tensor:
            with torch.no_grad():
                return self._scores.forward(batch.example(i))

        compare_rows(lambda: self._recorded(batch), alone, doubt)

    def _block_sums(self, blocks: Mapping[str, InputBlock]) -> BlockSums | None:
        if not blocks:
            return None
        return BlockSums(blocks, self._accumulators().blocks, self._parameters, self._dtype)

    def _joined(self, each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join the traces of single examples, (1,), to one tensor by name, 0 where missing."""
        none = torch.zeros(1, dtype=self._dtype, device=self._place.device)
        names = {name for one in each for name in one}
        return {name: torch.cat([one.get(name, none) for one in each]) for name in names}

    def _run(self, batch: Batch) -> tuple[Tensor, Iterator[Tensor]]:
        outputs = self._scores.forward(batch)
        return outputs, self._counted(self._scores.vectors(outputs.detach(), batch))

    def _counted(self, vectors: Iterable[Tensor]) -> Iterator[Tensor]:
        for vector in vectors:
            self._vectors += 1
            yield vector

    def _placed(self, batch: Batch) -> Batch:
        inputs, labels = placed(self._place, batch.inputs, batch.labels)
        return Batch(batch.number, inputs, labels, batch.indices)

    def _accumulators(self) -> Accumulators:
        if self.accumulators is None:
            self.accumulators = Accumulators(self._parameters, self._dtype, self._blocks)
        return self.accumulators

    @property
    def _sums(self) -> dict[str, Tensor]:
        return self._accumulators().sums


def _first_measured(batch: Batch) -> int:
    """Return the first example whose trace is measured where not all are.

    Another for each batch, so that it is independent of periods in the data: multiples of the
    golden ratio fill the unit interval evenly.
    """
    return int(batch.number * 0.6180339887498949 % 1 * min(MEASURED, len(batch)))


def where_in_data(batch: Batch) -> str:
    """Name a batch in a message, and its examples by their indices."""
    indices = [*batch.indices]
    which = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    if indices == [*range(indices[0], indices[0] + len(indices))]:
        which = f"{indices[0]} to {indices[-1]}"
    return f"batch {batch.number} (examples {which}, counted from 0)"


def _fallen(method: str, error: str | None, now: str, names: Iterable[str]) -> str:
    """Describe which parameters now use another method, and why."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    first = ", ".join(modules[:5]) + (", …" if len(modules) > 5 else "")
    why = "differ from single examples" if error is None else f"cannot be computed ({error})"
    return f"by {method}, the gradients of {first} {why}: continuing by {now}"


def _dependencies(outputs: Tensor, parameters: dict[str, nn.Parameter]) -> list[str]:
    if not parameters or not outputs.requires_grad:
        return []
    gradients = torch.autograd.grad(
        outputs,
        list(parameters.values()),
        torch.zeros_like(outputs),
        retain_graph=True,
        allow_unused=True,
    )
    return [name for name, g in zip(parameters, gradients, strict=True) if g is not None]
