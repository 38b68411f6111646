"""The head that a new task of a chain brings: its random start is nothing to stay close to."""

from torch import nn

from scripts.experiments.lib.tuning import Setting


def started(setting: Setting, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name, without those of a head that is the new task's own."""
    number = getattr(setting, "number", None)  # of tasks before the new one, in a chain
    own = None if number is None else f"{setting.head}{number}."
    found = model.named_parameters()
    return {name: p for name, p in found if own is None or not name.startswith(own)}
