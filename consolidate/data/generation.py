"""Examples that a causal language model generates: a sample of its own distribution, no data."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import nn
from torch.distributed import ProcessGroup

from consolidate.data.text_examples import Ragged, TextExamples
from consolidate.data.text_plan import TextPlan
from consolidate.data.texts import padding_token
from consolidate.estimation.batches import out_of_memory, place_of
from consolidate.estimation.likelihoods import IGNORED
from consolidate.models.model import Model
from consolidate.models.sampling import Continued, Written, continued, has_cache, reread, up_to_end
from consolidate.runtime.devices import release_memory
from consolidate.runtime.distributed import from_all, place_in
from consolidate.runtime.quiet import quiet
from formats.errors import ConsolidateError, InputError, UsageError
from formats.rows import Rows
from formats.wording import first_line

_CHECKED = 2  # texts of the first batch that are read whole too
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of log p; of narrower types _ROUGH
_ROUGH = 0.1


def generate(
    model: Model,
    plan: TextPlan,
    *,
    group: ProcessGroup | None = None,
    start: Written | None = None,
    keep: Callable[[Written], None] = lambda written: None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda texts: None,
) -> Written:
    """Generate the texts of a plan, batch by batch, which are dealt to the processes in turn.

    A batch that runs out of memory is split in half. `keep` is called after each batch of every
    process, from which another call can `start`.
    """
    written = start or Written()
    batches, (number, size) = plan.batches(), place_in(group)
    writer = _Writer(model.module, plan, note, written)
    done = 0
    while dealt := list(islice(batches, size)):
        done += sum(map(len, dealt))
        if done <= len(written.texts):  # before the work was interrupted
            continue
        own = writer.write(dealt[number]) if number < len(dealt) else []
        every, halvings = _exchanged(own, writer.halvings, plan, group)
        texts = [text for texts in every for text in texts]
        changed = writer.changed if written.changed is None else written.changed
        written = Written([*written.texts, *texts], writer.most, halvings, changed)
        progress(len(texts))
        keep(written)
    return written


class _Writer:
    """Generates batches of one process, as large as its memory allows."""

    def __init__(
        self, module: nn.Module, plan: TextPlan, note: Callable[[str], None], start: Written
    ) -> None:
        self.module, self.plan = module, plan
        self.most, self.halvings, self.changed = start.most, start.halvings, start.changed
        self._note = note
        self._cached = has_cache(module)
        self._checked = False

    def write(self, indices: Sequence[int]) -> list[list[int]]:
        """Generate the texts of these numbers, without their prompts."""
        found: list[list[int]] = []
        while len(found) < len(indices):
            some = indices[len(found) :][: self.most]
            texts = self._tried(some)
            if texts is None:
                self._halve(len(some))
                continue
            prompt = len(self.plan.prompt(some[0]))
            ends = self.plan.distribution.ends
            found += [up_to_end(ids[prompt:], ends) for ids in texts.ids.tolist()]
        return found

    def _tried(self, indices: Sequence[int]) -> Continued | None:
        """Generate a batch and check the first; None if memory was not enough."""
        try:
            texts = self._continued(indices)
            if not self._checked:
                texts = self._agreeing(texts, indices)
                self._checked = True
            return texts
        except ConsolidateError:
            raise
        except Exception as error:
            if out_of_memory(error):
                return None
            if self._checked or not self._cached:
                raise
            why = f"does not run ({type(error).__name__}: {first_line(error)})"
        self._leave_cache(why)
        return self._tried(indices)

    def _continued(self, indices: Sequence[int]) -> Continued:
        prompts = [self.plan.prompt(i) for i in indices]
        distribution, cached = self.plan.distribution, self._cached
        return continued(self.module, prompts, indices, distribution, cached=cached)

    def _agreeing(self, texts: Continued, indices: Sequence[int]) -> Continued:
        """Return texts whose tokens are as likely to the model when it reads them whole."""
        tolerance = _TOLERANCE.get(place_of(self.module).dtype or torch.float32, _ROUGH)
        found = reread(self.module, texts.first(_CHECKED), self.plan.distribution)
        if found.difference <= tolerance:
            self.changed = found.changed
            return texts
        if not self._cached:
            raise UsageError(
                "--generate needs a causal language model: the outputs of "
                f"{type(self.module).__name__} change with the tokens after them; measure it on "
                "--data"
            )
        self._leave_cache("changes its outputs")
        return self._agreeing(self._continued(indices), indices)

    def _leave_cache(self, why: str) -> None:
        name = type(self.module).__name__
        self._note(f"the cache of {name} {why}: generating without it, more slowly")
        self._cached = False

    def _halve(self, size: int) -> None:
        if size == 1:
            raise InputError(
                "out of memory with a single generated text: lower --max-length, or use a smaller "
                "--dtype or another device"
            )
        self.most = (size + 1) // 2
        self.halvings += 1
        self._note(f"out of memory with {size} texts: continuing with {self.most}")
        release_memory(place_of(self.module).device)


def _exchanged(
    own: list[list[int]], halvings: int, plan: TextPlan, group: ProcessGroup | None
) -> tuple[list[list[list[int]]], int]:
    """Give each process the texts of all, in the order of the processes, and the most halvings."""
    if group is None:
        return [own], halvings
    width, numbers = plan.distribution.most, [halvings, len(own)]
    for text in own:
        numbers += [len(text), *text, *[0] * (width - len(text))]
    numbers += [0] * (2 + plan.batch_size * (width + 1) - len(numbers))
    found = from_all(numbers, group)
    every = []
    for _, count, *rest in found:
        rows = [rest[n * (width + 1) :] for n in range(count)]
        every.append([row[1 : 1 + row[0]] for row in rows])
    return every, max(numbers[0] for numbers in found)


def examples_of(model: Model, plan: TextPlan, texts: Sequence[Sequence[int]]) -> TextExamples:
    """Return generated texts as examples with their own labels; prompts are not predicted."""
    ids, labels = Ragged(), Ragged()
    for i, text in enumerate(texts):
        prompt = plan.prompt(i)
        ids.append([*prompt, *text])
        labels.append([*[IGNORED] * len(prompt), *text])
    return TextExamples(
        {"input_ids": ids},
        labels,
        {"input_ids": padding_token(model)},
        cut=bytearray(len(ids)),
        max_length=plan.distribution.most,
    )


def json_lines(model: Model, prompts: Rows, texts: Sequence[Sequence[int]]) -> str:
    """Return generated texts as JSON Lines: ``{"text": …}``, with its prompt if it has one."""

    def lines() -> Iterator[str]:
        for i, ids in enumerate(texts):
            row = {"text": model.processor.decode(list(ids), skip_special_tokens=True)}
            row = {**prompts[i % len(prompts)], **row} if len(prompts) else row
            yield json.dumps(row, ensure_ascii=False) + "\n"

    with quiet():
        return "".join(lines())
