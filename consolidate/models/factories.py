"""Factories: a user's own function that creates the module of a checkpoint."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from consolidate.runtime.randomness import untouched_randomness
from formats.errors import ConsolidateError, UsageError
from formats.wording import suggestion

TIMM = "timm:create_model"
"""The factory whose arguments are read from timm's own config."""


def make_module(factory: str, config: dict[str, Any]) -> nn.Module:
    """Create a user's own module by ``package.module:function``, which may take the config."""
    module_name, colon, attribute = factory.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"--model {factory}: expected package.module:factory")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--model {factory}: no module named {error.name} in {here} or on sys.path; check "
                "the name"
            ) from error
        except Exception as error:
            raise UsageError(
                f"--model {factory}: importing {module_name} failed: {error}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(target, part):
                near = difflib.get_close_matches(part, dir(target), n=1)
                raise UsageError(
                    f"--model {factory}: {module_name} has no {part}{suggestion(near)}"
                )
            target = getattr(target, part)
        if not callable(target):
            raise UsageError(
                f"--model {factory}: expected a function or class, found "
                f"{attribute} of type {type(target).__name__}"
            )
        try:
            made = _call(factory, target, config)
        except ConsolidateError:
            raise
        except KeyError as error:
            if "num_labels" in config or error.args != ("num_labels",):
                raise _failed(factory, config, error) from error
            raise UsageError(
                f"--model {factory} reads num_labels, and config.json has neither num_labels nor "
                'id2label: add "num_labels", the number of outputs'
            ) from error
        except Exception as error:
            raise _failed(factory, config, error) from error
    finally:
        sys.path.remove(here)
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"--model {factory}: expected a torch.nn.Module, found {type(made).__name__}"
        )
    return made


def fresh_weights(factory: str, config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Create a user's own module and return its initial weights, tied ones once."""
    with untouched_randomness(seed):
        module = make_module(factory, config)
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: tensor for name, tensor in module.state_dict().items() if name in own}


def _call(factory: str, target: Callable[..., Any], config: dict[str, Any]) -> Any:
    """Call a factory with the config if it takes one; timm's with what its own config states."""
    if factory == TIMM:
        return target(**timm_arguments(deepcopy(config)))
    return target(_with_count(config)) if _takes_config(target) else target()


def timm_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` from a config.json as `save_for_hf` writes it."""
    name, inside = config.get("architecture"), config.get("pretrained_cfg")
    if not isinstance(name, str):
        raise UsageError(
            f"--model {TIMM}: expected a config.json with the key architecture, as "
            f"timm.models.save_for_hf writes it, found {name!r}"
        )
    arguments = {"pretrained_cfg": inside} if isinstance(inside, Mapping) else {}
    if "num_classes" in config:
        arguments["num_classes"] = config["num_classes"]
    return {"model_name": name, **arguments, **(config.get("model_args") or {})}


def _with_count(config: dict[str, Any]) -> dict[str, Any]:
    """Copy a config, with the number of its labels where only their names are given."""
    names = config.get("id2label")
    count = {"num_labels": len(names)} if isinstance(names, dict) and names else {}
    return count | deepcopy(config)


def _failed(factory: str, config: dict[str, Any], error: Exception) -> UsageError:
    return UsageError(
        f"--model {factory} failed with {type(error).__name__}: {error}; it is called with the "
        f"content of config.json{'' if config else ' (here empty)'}, or without arguments if it "
        "takes none"
    )


def _takes_config(target: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a callable written in C has no signature to read
        return True
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return any(parameter.kind not in by_name for parameter in parameters)
