"""The mapping between the tensors of a weights file and a module's parameters and buffers.

transformers renames, stacks, splits and transposes some tensors while it loads them. Whatever it
does to the weights θ must be done to their Fisher Λ and their anchor μ as well, and undone when
they are stored. A conversion is accepted if it is a permutation of elements, which is proved by
converting the position of every element: the resulting positions are the inverse.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor, nn

from formats.errors import InputError

if TYPE_CHECKING:
    from formats.fisher_json import Block

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Group:
    """Tensors of the file that are converted, together, to tensors of the module."""

    file_names: tuple[str, ...]
    module_names: tuple[str, ...]
    # From the file's tensors to the module's; None where a tensor is at most renamed.
    convert: Callable[[Sequence[Tensor]], list[Tensor]] | None


class Layout:
    """The correspondence between a module's names and those of its weights file."""

    def __init__(
        self,
        module: nn.Module,  # as loaded: its tied tensors are tied
        groups: Sequence[Group],  # module names may be any of a tied tensor's
        file_shapes: Shapes,  # in the file's order
        unused: Mapping[str, str],  # tensors without a place in the module -> the name looked up
        outside: Collection[str] = (),  # module names of another file (an adapter's base) or none
        outer: str = "",  # what all names of the file begin with, see `outer_prefix`
    ) -> None:
        self._file_shapes = dict(file_shapes)
        self._aliases: dict[str, str] = {}  # any name of a tied tensor -> the first one
        self._module_shapes: Shapes = {}
        first = {id(parameter): name for name, parameter in module.named_parameters()}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                own = self._aliases[name] = first.setdefault(id(tensor), name)
                self._module_shapes.setdefault(own, tuple(tensor.shape))
        self.unused = unused
        self.duplicates: dict[str, str] = {}  # second names of tied tensors in the file -> first
        self.groups = self._distinct(groups)
        known = {*outside, *(name for group in self.groups for name in group.module_names)}
        # Parameters that the file lacks, as those of a new head; new buffers are not stored.
        fresh = [name for name, _ in module.named_parameters() if name not in known]
        self.fresh = tuple(outer + name for name in fresh)
        self._file_shapes |= {outer + name: self._module_shapes[name] for name in fresh}
        groups = [*(Group((outer + name,), (name,), None) for name in fresh), *self.groups]
        self._group_of_file = {n: group for group in groups for n in group.file_names}
        self._group_of_module = {n: group for group in groups for n in group.module_names}
        self._place_in_file = {name: place for place, name in enumerate(self._file_shapes)}
        self._place_in_module = {name: place for place, name in enumerate(self._module_shapes)}
        for group in self.groups:
            self._check(group)

    def canonical(self, name: str) -> str | None:
        """Return a module tensor's name in `named_parameters`, None if there is no such tensor."""
        return self._aliases.get(name)

    def file_names(self, module_name: str) -> list[str]:
        """Return the file's tensors that a module tensor comes from; none for a lone buffer."""
        group = self._group_of_module.get(self._aliases[module_name])
        return [] if group is None else list(group.file_names)

    def module_names(self, file_name: str) -> list[str]:
        """Return the module tensors that come from one of the file; none for an unused one."""
        group = self._group_of_file.get(self.duplicates.get(file_name, file_name))
        return [] if group is None else list(group.module_names)

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert some or all tensors of the module to the names, shapes and order of the file."""
        given: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            canonical = self._aliases.get(name)
            if canonical is None:
                raise InputError(f"{name} is not a parameter of the model; check the name")
            _check_shape(name, tensor, self._module_shapes[canonical], "the model")
            given.setdefault(canonical, tensor)
        found: dict[str, Tensor] = {}
        by_name = self._group_of_module
        for group in dict.fromkeys(by_name[name] for name in given if name in by_name):
            if group.convert is None:
                found[group.file_names[0]] = given[group.module_names[0]]
            else:
                found.update(self._to_file(group, given))
        return {name: found[name] for name in sorted(found, key=self._place_in_file.__getitem__)}

    def to_module(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of the file, lazy or not, to names, shapes and order of the module."""
        found: dict[str, Tensor] = {}
        for name in tensors:
            if name not in self._file_shapes:
                raise InputError(f"{name} is not a tensor of the model's weights file")
        by_name = self._group_of_file
        # A tensor may be given under its second name alone.
        given = {self.duplicates[name]: name for name in tensors if name in self.duplicates}
        given |= {name: name for name in tensors if name not in self.duplicates}
        for group in dict.fromkeys(by_name[name] for name in given if name in by_name):
            absent = [name for name in group.file_names if name not in given]
            if absent:
                raise InputError(
                    f"{absent[0]} is missing: expected all {len(group.file_names)} tensors of the "
                    f"file that form {group.module_names[0]}, found "
                    f"{len(group.file_names) - len(absent)}"
                )
            parts = []
            for name in group.file_names:
                parts.append(tensors[given[name]])
                _check_shape(name, parts[-1], self._file_shapes[name], "the weights file")
            converted = parts if group.convert is None else group.convert(parts)
            found.update(zip(group.module_names, converted, strict=True))
        return {name: found[name] for name in sorted(found, key=self._place_in_module.__getitem__)}

    def stored_alone(self) -> dict[str, str]:
        """Map the module tensors that the file has in the same form to their names in it."""
        own = {n: g.file_names[0] for n, g in self._group_of_module.items() if g.convert is None}
        return {name: own[at] for name, at in self._aliases.items() if at in own}

    def loaded_alone(self) -> dict[str, str]:
        """Map the file's tensors that the module has in the same form to their names in it."""
        own = {n: g.module_names[0] for n, g in self._group_of_file.items() if g.convert is None}
        seconds = self.duplicates.items()
        return own | {second: own[first] for second, first in seconds if first in own}

    def _distinct(self, groups: Sequence[Group]) -> list[Group]:
        """Use one name for each module tensor, and drop second copies of tied tensors."""
        stored: dict[tuple[str, ...], list[Group]] = {}
        for group in groups:
            names = tuple(self._aliases[name] for name in group.module_names)
            stored.setdefault(names, []).append(group)
        kept = []
        for names, of_one in stored.items():
            # torch's own name for a tied tensor takes precedence over the file's order.
            winner = next((group for group in of_one if group.module_names == names), of_one[0])
            kept.append(Group(winner.file_names, names, winner.convert))
            for other in of_one:
                if other is winner:
                    continue
                if len(other.file_names) != len(winner.file_names):
                    raise InputError(
                        f"{winner.file_names[0]} and {other.file_names[0]} are one tensor in the "
                        f"model, but {len(winner.file_names)} and {len(other.file_names)} tensors "
                        "in the file; store it once"
                    )
                self.duplicates |= dict(zip(other.file_names, winner.file_names, strict=True))
        return kept

    def _check(self, group: Group) -> None:
        if group.convert is None:
            name, module_name = group.file_names[0], group.module_names[0]
            found, expected = self._file_shapes[name], self._module_shapes[module_name]
            if found != expected:
                raise InputError(
                    f"the shape of {name} does not match: expected {list(expected)} as in the "
                    f"model, found {list(found)} in the file; use the config.json that belongs to "
                    "the weights"
                )
            return
        elements = sum(self._sizes(group))
        others = len(group.file_names) - 1
        subject = group.file_names[0] + (f" and {others} other tensors" if others else "")
        refusal = (
            f"{subject} cannot be used: expected a permutation of elements while loading "
            f"{', '.join(group.module_names)}, found another conversion, for which no Fisher can "
            "be stored"
        )
        try:
            positions = self._positions(group)
        except Exception as error:  # an operation that refuses integers is not a permutation
            raise InputError(f"{refusal} ({error})") from error
        seen = torch.zeros(elements, dtype=torch.bool)
        count = 0
        for name, position in zip(group.module_names, positions, strict=True):
            if tuple(position.shape) != self._module_shapes[name]:
                raise InputError(
                    f"the shape of {name}, converted from {group.file_names[0]}, does not match: "
                    f"expected {list(self._module_shapes[name])} as in the model, found "
                    f"{list(position.shape)}"
                )
            if position.is_floating_point() or (count := count + position.numel()) > elements:
                raise InputError(refusal)
            if position.numel() and not 0 <= int(position.min()) <= int(position.max()) < elements:
                raise InputError(refusal)
            seen[position.flatten()] = True
        if not bool(seen.all()):
            raise InputError(refusal)

    def _positions(self, group: Group) -> list[Tensor]:
        """Return, for each module tensor, the positions of its elements in the group's tensors."""
        assert group.convert is not None
        total = sum(self._sizes(group))
        numbers = torch.arange(total, dtype=torch.int32 if total < 2**31 else torch.int64)
        return group.convert(list(self._parts(group, numbers).values()))

    def _to_file(self, group: Group, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sample = next(given[name] for name in group.module_names if name in given)
        flat = sample.new_zeros(sum(self._sizes(group)))  # elements that are not given are zero
        for name, position in zip(group.module_names, self._positions(group), strict=True):
            if name in given:
                flat[position.flatten().to(flat.device)] = given[name].detach().flatten().to(flat)
        # Copies, because safetensors refuses tensors that share memory.
        return {name: part.clone() for name, part in self._parts(group, flat).items()}

    def _parts(self, group: Group, flat: Tensor) -> dict[str, Tensor]:
        """Split the elements of a group into its tensors of the file."""
        parts = zip(group.file_names, flat.split(self._sizes(group)), strict=True)
        return {name: part.reshape(self._file_shapes[name]) for name, part in parts}

    def _sizes(self, group: Group) -> list[int]:
        return [math.prod(self._file_shapes[name]) for name in group.file_names]


def renamed_factors(
    factors: Mapping[str, Tensor], blocks: Mapping[str, "Block"], names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, "Block"]]:
    """Give matrices whose parameters all have a new name, each named after the first of them."""
    matrices, renamed = {}, {}
    for name, block in blocks.items():
        if all(parameter in names for parameter in block.parameters):
            parameters = tuple(names[parameter] for parameter in block.parameters)
            at = f"{parameters[0]}.{block.matrix}"
            matrices[at] = factors[name]
            renamed[at] = msgspec.structs.replace(block, parameters=parameters)
    return matrices, renamed


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"the shape of {name} does not match: expected {list(shape)} as in {where}, found "
            f"{list(tensor.shape)}"
        )
