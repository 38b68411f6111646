"""What generated texts begin with, and the tokens that end them."""

from pathlib import Path
from typing import Any

from consolidate.data.chats import Chats
from consolidate.models.model import Model
from consolidate.runtime.quiet import quiet
from formats.checkpoint import read_beside
from formats.errors import InputError, UsageError
from formats.rows import Rows
from formats.text_rows import PromptRows


class NoPrompts(Rows):
    """The rows of texts without a prompt: none."""

    def __init__(self) -> None:
        self.name, self.columns = "", ["prompt"]

    def __len__(self) -> int:
        return 0

    def read_row(self, i: int) -> dict[str, Any]:
        """Refuse, as there is no row."""
        raise IndexError(i)

    def digest(self) -> str:
        """Return that there is no content."""
        return ""


def open_prompts(path: str | Path | None) -> Rows:
    """Open the prompts, or no prompts."""
    if path is None:
        return NoPrompts()
    try:
        return PromptRows(Path(path).expanduser())
    except OSError as error:
        raise InputError(f"{path}: the prompts cannot be read: {error.strerror}") from error


def starts_of(model: Model, prompts: Rows) -> list[list[int]]:
    """Return the token ids that texts begin with.

    Each prompt; without prompts what a chat template writes before a user's words, since a model
    that was tuned for chats seldom saw a text begin otherwise (as in Xu et al. 2024,
    https://arxiv.org/abs/2406.08464); where it writes nothing the first token alone.
    """
    if len(prompts):
        return _encoded(model, prompts)
    ids: list[int] = []
    if getattr(model.processor, "chat_template", None):
        ids = Chats(model.processor, prompts, model.checkpoint.path).before_user()
    where = f"{model.checkpoint.path}: the chat template"
    return [[_known(model, token, where) for token in ids] or [_first_token(model)]]


def _first_token(model: Model) -> int:
    """Return the token that texts without a prompt begin with."""
    for name in ("bos_token_id", "eos_token_id"):
        for place in (model.processor, model.module.config):
            for token in _tokens(getattr(place, name, None)):
                return _known(model, token, name)
    raise UsageError(
        f"{model.checkpoint.path}: neither tokenizer nor config has a beginning-of-text or an "
        "end-of-text token to begin with: give --prompts FILE"
    )


def end_tokens(model: Model) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the checkpoint's config."""
    source = model.checkpoint.base or model.checkpoint
    written = read_beside(source.path, "generation_config.json") if source.path.is_dir() else {}
    stated = written.get("eos_token_id", getattr(model.module.config, "eos_token_id", None))
    of_tokenizer = getattr(model.processor, "eos_token_id", None)
    return frozenset([*_tokens(of_tokenizer), *_tokens(stated)])


def _tokens(stated: Any) -> list[int]:
    """Return token ids that a config gives as a number, a list or not at all."""
    several = stated if isinstance(stated, list) else [stated]
    whole = (token for token in several if isinstance(token, int) and not isinstance(token, bool))
    return [token for token in whole if 0 <= token < 2**31]


def _known(model: Model, token: int, name: str) -> int:
    module: Any = model.module
    known = len(module.get_input_embeddings().weight)
    if not 0 <= token < known:
        raise InputError(
            f"{model.checkpoint.path}: {name}: expected a token id below {known}, the rows of the "
            f"model's embedding, found {token}: correct it, or give --prompts FILE"
        )
    return token


def _encoded(model: Model, rows: Rows) -> list[list[int]]:
    """Encode prompts: as a user's turn where the tokenizer has a chat template."""
    tokenizer = model.processor
    if tokenizer is None:
        raise InputError(
            f"{model.checkpoint.path}: --prompts need a tokenizer, found none; save it beside the "
            "weights"
        )
    chats, found = Chats(tokenizer, rows, model.checkpoint.path), []
    as_chats = bool(getattr(tokenizer, "chat_template", None))
    with quiet():
        for i, row in enumerate(rows):
            ids = chats.asking(i, row["prompt"]) if as_chats else _plain(tokenizer, row["prompt"])
            if not ids:
                raise InputError(
                    f"{rows.where(i)}: expected a prompt, found one without tokens"
                    + " once the chat template wrote it" * as_chats
                    + "; leave the line out"
                )
            found.append([_known(model, token, rows.where(i)) for token in ids])
        first = rows[0]["prompt"]
        if as_chats and found[0] == chats.asking(0, f"{first} {first}"):
            raise InputError(
                f"{rows.where(0)}: the chat template of {model.checkpoint.path} leaves the prompt "
                "out: expected a template that writes the user's turn; correct it"
            )
    return found


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Encode a prompt without a template, and without the end token that some tokenizers add."""
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
