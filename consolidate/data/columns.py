"""The columns of task data: which holds the text, which the label."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Columns:
    """The names of the columns with each role; None takes the usual ones."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None  # the words of a token classification
    image: str | None = None
    inputs: str | None = None  # tensors for a module of the user's own
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None  # chats
    target: str | None = None  # what an encoder-decoder writes


def columns_of(given: Columns | None, named: Mapping[str, str]) -> Columns:
    """Take the columns from the options, and from the task file where the options name none.

    Args:
        given: The options.
        named: What the task file says, by role.

    Returns:
        Where the inputs and labels are.
    """
    options = {} if given is None else {k: v for k, v in asdict(given).items() if v is not None}
    return Columns(**{**named, **options})
