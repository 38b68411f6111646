"""Chats, written by the tokenizer's chat template, and which of their tokens are predicted."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from consolidate.estimation.likelihoods import IGNORED
from formats.errors import InputError
from formats.rows import Rows
from formats.wording import shown

MAX_CHARACTERS = 16 * 2**20
"""Longest chat that a template may write: a template is content of the checkpoint."""

MAX_LINES = 2**21
"""Most lines of its compiled code that a template may run for one chat: real ones run about 100 a
message. Counted, not timed, so that it is the same chat that is refused on every machine."""

_DAY = {
    "%Y": "2024",
    "%y": "24",
    "%m": "07",
    "%-m": "7",
    "%B": "July",
    "%b": "Jul",
    "%d": "26",
    "%-d": "26",
    "%e": "26",
    "%j": "208",
    "%A": "Friday",
    "%a": "Fri",
    "%F": "2024-07-26",
    "%H": "00",
    "%I": "12",
    "%M": "00",
    "%S": "00",
    "%p": "AM",
}
"""The day that the templates of Llama 3 write where they find no clock."""

# A template's own macro hides the clock of transformers. Its line ends with a block, whose newline
# is trimmed, so that the template below begins a line as before.
_NO_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {value!r})" for code, value in _DAY.items())
    + " }}{% endmacro %}\n"
)
_WORDS = "words of a user"  # stand for a message where only what is around it is wanted
_MASK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Document(NamedTuple):
    """Token ids and labels of one row, of the same length."""

    ids: list[int]
    labels: list[int]
    prompt: int = 0  # tokens at the beginning that are cut first


class _Chat(NamedTuple):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str


class Chats:
    """The chat template of a tokenizer, applied to the rows of a dataset."""

    def __init__(self, tokenizer: Any, rows: Rows, source: Path) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.source = source  # the checkpoint
        self.how: list[str] = []  # notes on what the template does

    def documents(self, column: str, loss_on: str) -> Iterator[Document]:
        """Write the chats in a column: all of each is predicted, or the assistant's turns alone."""
        for i in range(len(self.rows)):
            chat = self._read(i, self.rows[i], column)
            if loss_on == "completion":
                raise unsuitable(chat.where, loss_on, f"a chat of {len(chat.messages)} messages")
            yield self._of_assistant(chat) if loss_on == "assistant" else self._whole(chat)

    def asking(self, i: int, prompt: str) -> list[int]:
        """Write the prompt of row `i` as a user's turn, with the header of the answer."""
        turn = {"role": "user", "content": prompt}
        return self._ids(_Chat([turn], None, self.rows.where(i)), asks=True)

    def before_user(self) -> list[int]:
        """Write what stands before the words of a user who opens a chat; it may be nothing.

        Raises:
            InputError: The template leaves the words out, or changes them.
        """
        turn = {"role": "user", "content": _WORDS}
        before, words, _ = self._text(_Chat([turn], None, str(self.source))).partition(_WORDS)
        if not words:
            raise InputError(
                f"{self.source}: expected a chat template that writes a user's words as they are, "
                "found one that leaves them out or changes them: measure with `consolidate fisher "
                "--generate N --prompts FILE`, or correct the template"
            )
        return list(self.tokenizer(before, add_special_tokens=False)["input_ids"])

    def completed(
        self, i: int, row: dict[str, Any], prompt: str, completion: str, loss_on: str
    ) -> Document:
        """Write a prompt and its completion, both lists of messages, as one chat."""
        before = self._read(i, row, prompt)
        after = self._read(i, row, completion)
        chat = after._replace(messages=before.messages + after.messages)
        if loss_on == "assistant":
            return self._of_assistant(chat)
        if loss_on == "all":
            return self._whole(chat)
        ids = self._ids(chat)
        start = self._prefix(chat, len(before.messages), ids, "completion", asks=True)
        return Document(ids, [IGNORED] * start + ids[start:], start)

    def _read(self, i: int, row: dict[str, Any], column: str) -> _Chat:
        where = self.rows.where(i, column)
        messages, tools = row.get(column), row.get("tools")
        if self.rows.fills_in:
            messages, tools = _without_nulls(messages), _without_nulls(tools)
        messages, tools = _from_json(messages), _from_json(tools)
        if fault := _no_list_of_dicts(messages):
            raise InputError(
                f"{where}: expected a list of messages with role and content, found {fault}"
            )
        if tools not in (None, []) and (fault := _no_list_of_dicts(tools)):
            raise InputError(
                f"{self.rows.where(i, 'tools')}: expected a list of tools as JSON schemas, found "
                f"{fault}"
            )
        return _Chat(messages, tools, where)

    def _whole(self, chat: _Chat) -> Document:
        ids = self._ids(chat)
        return Document(ids, list(ids))

    def _of_assistant(self, chat: _Chat) -> Document:
        template = self._template(chat)
        # Only a fast tokenizer knows which characters a token stands for.
        if _MASK.search(template) and self.tokenizer.is_fast:
            self._note("as the chat template marks them")
            self._text(chat)  # refuse what is too long
            written = self._apply(chat, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = list(written["input_ids"]), written["assistant_masks"]
            marks = zip(ids, mask, strict=True)
            return Document(ids, [token if marked else IGNORED for token, marked in marks])
        self._note("found by prefixes, as the chat template has no {% generation %} mask")
        if "add_generation_prompt" not in template:
            self._note("with their headers, as the chat template has no generation prompt")
        ids = self._ids(chat)
        return Document(ids, self._between_prefixes(chat, ids))

    def _between_prefixes(self, chat: _Chat, ids: list[int]) -> list[int]:
        """Label what each of the assistant's turns adds to the chat before it."""
        labels, last = [IGNORED] * len(ids), len(chat.messages) - 1
        for n, message in enumerate(chat.messages):
            if message.get("role") == "assistant":
                turn = f"turn {n + 1}"
                start = self._prefix(chat, n, ids, turn, asks=True)
                end = len(ids) if n == last else self._prefix(chat, n + 1, ids, turn)
                labels[start:end] = ids[start:end]
        return labels

    def _prefix(
        self, chat: _Chat, count: int, whole: list[int], part: str, *, asks: bool = False
    ) -> int:
        """Count the tokens of the first messages, with which the whole chat has to begin."""
        why = "nothing stands before it"
        if count:
            ids = self._ids(chat._replace(messages=chat.messages[:count]), asks=asks)
            if whole[: len(ids)] == ids:
                return len(ids)
            pairs = enumerate(zip_longest(ids, whole[: len(ids)]), 1)
            at = next(n for n, (one, other) in pairs if one != other)
            why = (
                f"expected the chat to begin with what is {'before' if asks else 'up to'} it, "
                f"found another token {at}"
            )
        raise InputError(
            f"{chat.where}, {part}: cannot tell which tokens are to be predicted: {why}; mark them "
            "in the chat template by {% generation %} … {% endgeneration %}, or use --loss-on all"
        )

    def _ids(self, chat: _Chat, *, asks: bool = False) -> list[int]:
        text = self._text(chat, asks=asks)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, chat: _Chat, *, asks: bool = False) -> str:
        """Write the chat; `asks`: with the header of the assistant's next answer."""
        template = self._template(chat)
        text: str = self._apply(chat, tokenize=False, add_generation_prompt=asks)
        if len(text) > MAX_CHARACTERS:
            raise InputError(
                f"{chat.where}: the chat template writes {len(text):,} characters: expected at "
                f"most {MAX_CHARACTERS:,}; correct the template, or split the chat"
            )
        if chat.tools and "tools" not in template:
            self._note("without the tools, which the chat template does not use")
        return text

    def _template(self, chat: _Chat) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{self.source}: messages need a chat template, and the tokenizer has none; set "
                "its chat_template"
            )
        try:
            return str(self.tokenizer.get_chat_template(tools=chat.tools))
        except ValueError as error:  # several templates, and none is the default
            raise InputError(f"{self.source}: {error}") from error

    def _apply(self, chat: _Chat, **options: Any) -> Any:
        template = self._template(chat)
        if "strftime_now" in template:  # else every day would encode the same rows otherwise
            template = _NO_CLOCK + template
            self._note(f"with {_DAY['%F']} as the chat template's current date")
        try:
            with self._bounded(chat):
                return self.tokenizer.apply_chat_template(
                    chat.messages, tools=chat.tools, chat_template=template, **options
                )
        except InputError:
            raise
        except Exception as error:  # what a template may raise has no bounds
            raise InputError(
                f"{chat.where}: the chat template refuses these messages: {error}"
            ) from error

    @contextmanager
    def _bounded(self, chat: _Chat) -> Iterator[None]:
        """Refuse a chat for which the template runs too many lines."""
        lines = 0

        def line(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal lines
            lines += 1
            if lines > MAX_LINES:
                raise InputError(
                    f"{chat.where}: the chat template of {self.source} runs more than "
                    f"{MAX_LINES:,} lines for this chat, perhaps in an endless loop; correct the "
                    "template, or split the chat"
                )
            return line

        def call(frame: FrameType, event: str, argument: object) -> Any:
            return line if frame.f_code.co_filename == "<template>" else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _note(self, how: str) -> None:
        if how not in self.how:
            self.how.append(how)


def _from_json(value: Any) -> Any:
    """Read what a table keeps as JSON text; other values and texts are returned as they are."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value or "null")
    if isinstance(value, list):  # of JSON texts, where the objects have unlike keys
        return [_from_json(one) if isinstance(one, str) else one for one in value]
    return value


def _without_nulls(value: Any) -> Any:
    """Leave out the keys that a table fills in with nulls, as other rows have them."""
    if isinstance(value, Mapping):
        kept = {key for key, inner in value.items() if inner is not None or key == "content"}
        return {key: _without_nulls(inner) for key, inner in value.items() if key in kept}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _no_list_of_dicts(value: Any) -> str:
    """Describe what is wrong with a list of objects; empty where nothing is."""
    if not isinstance(value, list):
        return shown(value)
    wrong = (f"{shown(one)} in the list" for one in value if not isinstance(one, dict))
    return "an empty list" if not value else next(wrong, "")


def loss_text(loss_on: str, how: Iterable[str] = ()) -> str:
    """Say in words what the loss is on, and how that was found."""
    on = {"assistant": "the assistant's turns", "completion": "the completions"}
    return ", ".join([f"loss on {on.get(loss_on, 'all tokens')}", *how])


def unsuitable(where: str, loss_on: str, found: str) -> InputError:
    """Return that the loss cannot be on something that a row does not have."""
    needed = {
        "assistant": "a chat (messages, or a prompt and a completion that are lists of messages)",
        "completion": "a prompt and its completion",
    }
    return InputError(
        f"{where}: --loss-on {loss_on} needs {needed[loss_on]}, found {found}; leave --loss-on out"
    )
