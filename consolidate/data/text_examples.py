"""Token ids with their labels, in memory and in batches."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from consolidate.data.examples import Examples
from consolidate.estimation.likelihoods import IGNORED
from consolidate.runtime.randomness import uniforms

_MASKED, _KEPT_OR_RANDOM, _WHICH_TOKEN = 1, 2, 3  # streams of uniforms; 0 samples labels


class Ragged:
    """Sequences of integers of different lengths, in one block of memory."""

    def __init__(self) -> None:
        self._values = array("i")
        self._ends = array("q", [0])

    def append(self, values: Iterable[int]) -> None:
        """Add a sequence at the end."""
        self._values.extend(values)
        self._ends.append(len(self._values))

    def largest(self) -> int:
        """Return the largest integer of all; −1 where there is none."""
        return max(self._values, default=-1)

    def length(self, i: int) -> int:
        """Return the length of sequence `i`."""
        return self._ends[i + 1] - self._ends[i]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Tensor:
        values = np.frombuffer(self._values, dtype=np.intc)[self._ends[i] : self._ends[i + 1]]
        return torch.from_numpy(values.astype(np.int64))


@dataclass(frozen=True)
class Masking:
    """Which tokens a masked language model predicts: 15%, of them 80% masked and 10% replaced.

    Devlin et al. 2019, section 3.1. At least one token of each text is predicted.
    """

    mask_token: int
    special_tokens: Tensor
    vocabulary: int
    seed: int

    def apply(self, ids: Tensor, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return masked ids and labels, (B, T); padding must be a special token in `ids`."""
        draws = [
            uniforms(self.seed, indices, ids.shape[1], epoch, stream=stream)
            for stream in (_MASKED, _KEPT_OR_RANDOM, _WHICH_TOKEN)
        ]
        special = torch.isin(ids, self.special_tokens)
        draw = draws[0].masked_fill(special, 2.0)
        least = draw == draw.amin(1, keepdim=True)
        chosen = ((draw < 0.15) | least) & ~special
        labels = ids.masked_fill(~chosen, IGNORED)
        masked = ids.masked_fill(chosen & (draws[1] < 0.8), self.mask_token)
        replaced = chosen & (draws[1] >= 0.9)
        return torch.where(replaced, (draws[2] * self.vocabulary).long(), masked), labels


@dataclass(eq=False)
class TextExamples(Examples):
    """Token ids, padded on the right batch by batch."""

    fields: dict[str, Ragged]  # `input_ids` and maybe `token_type_ids`
    labels: Ragged | Tensor | None  # of each text; None where masking creates them
    padding: dict[str, int]  # of each field
    masking: Masking | None = None
    cut: bytearray = field(default_factory=bytearray)  # how many texts of each were truncated
    texts_each: int = 1
    max_length: int = 0

    def __len__(self) -> int:
        return len(self.fields["input_ids"])

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return token ids, attention mask and the model's other inputs, (B, T), and labels."""
        inputs = {
            name: _padded([values[i] for i in indices], self.padding[name])
            for name, values in self.fields.items()
        }
        lengths = torch.tensor([self.length(i) for i in indices])
        present = torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
        inputs["attention_mask"] = present.long()
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        if self.masking is not None:
            # Padding may be a token that also occurs in texts, so it is marked separately.
            ids = inputs["input_ids"].masked_fill(~present, int(self.masking.special_tokens[0]))
            masked, labels = self.masking.apply(ids, chosen, epoch)
            inputs["input_ids"] = torch.where(present, masked, inputs["input_ids"])
        elif isinstance(self.labels, Ragged):
            labels = _padded([self.labels[i] for i in indices], IGNORED)
        else:
            assert self.labels is not None
            labels = self.labels[chosen]
        return inputs, labels

    def length(self, i: int) -> int:
        """Return the number of tokens."""
        return self.fields["input_ids"].length(i)

    def notes_on(self, used: Sequence[int] | None = None) -> list[str]:
        """Return the notes, with how many texts of the examples used were truncated."""
        used = range(len(self)) if used is None else used
        if not (cut := sum(self.cut[i] for i in used)):
            return self.notes
        count = self.texts_each * len(used)
        note = f"{cut} of {count} texts were truncated to {self.max_length} tokens"
        return [note, *self.notes]


def _padded(sequences: list[Tensor], value: int) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value)  # (B, T)
