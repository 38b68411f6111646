"""Texts as a model reads them: its tokenizer and limits, and what truncation cut off."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from consolidate.data.labels import describe
from consolidate.data.text_bounds import T, shortened, stated_length
from consolidate.data.text_examples import Ragged, TextExamples
from consolidate.models.model import Model
from formats.errors import InputError, UsageError
from formats.rows import Rows

_ROWS_AT_ONCE = 1000
_LONGEST_PACK = 1024  # tokens, unless --max-length is given: some models accept up to 10⁵
_LONGEST = 512  # for models without a limit
# The positions of these models begin after the padding token's id.
_OFFSET_POSITIONS = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "longformer")

Chunk = list[tuple[int, dict[str, Any]]]  # rows with their indices


class TokenizedTexts:
    """The tokenizer with the model's limits, and the counts for the notes."""

    def __init__(self, rows: Rows, model: Model, max_length: int | None, pack: bool) -> None:
        self.rows = rows
        self.model = model
        self.tokenizer = model.processor
        limit = most_tokens(model)
        if max_length is not None and limit is not None and max_length > limit:
            raise UsageError(
                f"--max-length: expected at most {limit}, the limit of the model, found "
                f"{max_length}"
            )
        of_tokenizer = stated_length(self.tokenizer, model.checkpoint.path)
        stated = [n for n in (limit, of_tokenizer) if n is not None and n < 10**9]
        longest = min(stated, default=_LONGEST)
        self.max_length = max_length or (min(longest, _LONGEST_PACK) if pack else longest)
        self.whole = pack  # all tokens of all texts are kept
        self.cut = bytearray()
        self.empty = 0  # rows without anything to predict
        self.cut_off = 0  # of these, rows that had it before they were truncated
        self.example: tuple[str, str] | None = None  # the first text, and where it is
        accepted = inspect.signature(model.module.forward).parameters
        config = model.module.config
        # Decoders such as GPT-2 would add an embedding of types that they were not trained with.
        self.has_types = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1
        self.padding = {
            "input_ids": padding_token(model),
            "token_type_ids": int(getattr(self.tokenizer, "pad_token_type_id", 0)),
        }
        self.kept = {name: Ragged() for name in [*self.padding][: 1 + self.has_types]}

    def column(self, chunk: Chunk, column: str) -> list[str]:
        """Return a column of some rows, as `text` does."""
        return [self.text(row, i, column) for i, row in chunk]

    def text(self, row: dict[str, Any], i: int, column: str, *, last: bool = False) -> str:
        """Return what is kept of a text: its end where `last`; refuse another type."""
        value = row.get(column)
        if not isinstance(value, str):
            raise InputError(
                f"{self.rows.where(i, column)}: expected a text, found {describe(value)}"
            )
        if self.example is None and value.strip():
            self.example = self.rows.where(i, column), value
        return self.shortened(value, last=last)

    def shortened(self, value: T, *, last: bool = False, **options: Any) -> T:
        """Return what the tokens that are kept depend on: at the end where `last`."""
        if self.whole:
            return value
        objective = self.model.objective.name
        # `text_encoding` truncates the texts of causal models, and the tokenizer all others.
        last |= self.tokenizer.truncation_side == "left" and objective != "causal-lm"
        kinds = ("text", "text_target") if objective == "seq2seq-lm" else ("text",)
        return shortened(self.tokenizer, value, self.max_length, last=last, kinds=kinds, **options)

    def encode(
        self,
        texts: list[Any],
        pairs: list[Any] | None = None,
        *,
        target: bool = False,
        **options: Any,
    ) -> tuple[Any, set[int]]:
        """Tokenize, truncate to `max_length`, and return which texts were truncated."""
        # In translation the target has another language, with other special tokens.
        given = {"text_target": texts} if target else {"text": texts, "text_pair": pairs}
        special = self.tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        if self.max_length <= special:
            raise UsageError(
                f"--max-length: expected more than the {special} special tokens, found "
                f"{self.max_length}"
            )
        options |= {"return_token_type_ids": self.has_types, "return_attention_mask": False}
        full = self.tokenizer(**given, truncation=False, **options)
        long = {n for n, ids in enumerate(full["input_ids"]) if len(ids) > self.max_length}
        if not long:
            return full, long
        encoded = self.tokenizer(
            **given, truncation="longest_first", max_length=self.max_length, **options
        )
        return encoded, long

    def keep(self, encoded: Any, n: int, cut: int) -> None:
        """Store text `n` of those that were encoded together, of which `cut` were truncated."""
        for name, values in self.kept.items():
            values.append(encoded[name][n])
        self.cut.append(cut)

    def examples(
        self, labels: Ragged | Tensor | None, fields: dict[str, Ragged] | None = None, **more: Any
    ) -> TextExamples:
        """Return what was stored, in `kept` or in `fields`, as examples."""
        more |= {"cut": self.cut, "max_length": self.max_length}
        return TextExamples(fields or self.kept, labels, self.padding, **more)

    def ids(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text, with special ones or without."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows, some at once."""
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            yield list(enumerate(self.rows[start : start + _ROWS_AT_ONCE], start))

    def notes(self) -> list[str]:
        """Return the note on rows that were left out, if any."""
        if not self.empty:
            return []
        note = f"{self.empty} of {len(self.rows)} rows have nothing to predict and were left out"
        if self.cut_off:
            note += f"; in {self.cut_off} of them truncation to {self.max_length} tokens cut it off"
        return [note]

    def nothing_to_predict(self) -> InputError:
        """Return the reason why no row is left."""
        if self.cut_off:
            return InputError(
                f"{self.rows.name}: truncation to {self.max_length} tokens cut off all that is "
                f"predicted in {self.cut_off} of {len(self.rows)} rows; raise --max-length"
            )
        if self.example is not None and self.all_unknown(
            [self.ids(self.example[1], special=False)]
        ):
            return self.unknown_tokens()
        return InputError(
            f"{self.rows.name}: expected at least one row with a prediction, found none"
        )

    def all_unknown(self, sequences: Iterable[Iterable[int]]) -> bool:
        """Return whether no token of any sequence is of the vocabulary, save special ones."""
        unknown, special = self.tokenizer.unk_token_id, set(self.tokenizer.all_special_ids)
        found = False
        for ids in map(set, sequences):
            if not special.issuperset(ids):
                return False
            found |= not ids or unknown in ids
        return found

    def unknown_tokens(self) -> InputError:
        """Return that the tokenizer knows nothing of the texts."""
        where, such = self.rows.name, ""
        if self.example is not None:
            where, such = self.example[0], f", such as {self.example[1][:40]!r},"
        return InputError(
            f"{where}: all tokens of all texts{such} are unknown to the tokenizer in "
            f"{self.model.checkpoint.path}, which is probably that of another model; save the "
            "model's own tokenizer beside the weights"
        )


def padding_token(model: Model) -> int:
    """Return the id to pad with: the config's, by which classifiers find the last token.

    Else the tokenizer's, or 0, as padding is masked; a masked language model must know it.
    """
    module: Any = model.module
    pads = [getattr(at, "pad_token_id", None) for at in (module.config, model.processor)]
    if model.objective.name == "masked-lm":
        return int(next((pad for pad in reversed(pads) if pad is not None), 0))
    known = len(module.get_input_embeddings().weight)
    return next((int(pad) for pad in pads if pad is not None and 0 <= pad < known), 0)


def most_tokens(model: Model) -> int | None:
    """Return how many tokens a model reads at most; None where its config has no limit."""
    config: Any = model.module.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        limit -= (config.pad_token_id or 0) + 1
    return limit
