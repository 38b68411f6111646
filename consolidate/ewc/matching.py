"""The parameters of a penalty, and the tensors stored for them: matched by name and checked."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from consolidate.runtime.shards import cut_like, is_cut, local, sum_of_parts
from formats.errors import InputError, NonFiniteError, UsageError

NamedParameters = nn.Module | Iterable[tuple[str, nn.Parameter]]
WRAPPERS = {  # class -> its name of the module inside, which begins all names of parameters
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def named(parameters: NamedParameters, wanted: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return parameters by name, without the prefix of a wrapper if the wanted names have none."""
    if not isinstance(parameters, nn.Module):
        return dict(parameters)
    known = dict(parameters.named_parameters())
    if any(name not in known for name in wanted):
        known = dict(unwrapped(parameters).named_parameters())
    return known


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile."""
    while (child := WRAPPERS.get(type(module).__name__)) is not None:
        module = getattr(module, child)
    return module


def check_strength(ewc_lambda: float, dtype: torch.dtype | None) -> None:
    """Refuse a λ that is negative or not finite, and a dtype of Λ and μ that is not floating."""
    if not (math.isfinite(ewc_lambda) and ewc_lambda >= 0):
        raise UsageError(f"ewc_lambda is {ewc_lambda}: expected a finite number, 0 or above")
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"Λ and μ cannot be stored in {dtype}; use float32 or bfloat16")


def check_once(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a parameter that is there twice."""
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise InputError("a tied parameter has two names and would count twice; pass it once")


def checked_tensors(
    name: str, parameter: nn.Parameter, fisher: Tensor, anchors: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return Λ and μ of a parameter θ, without gradients; μ is θ itself if there are no anchors.

    Tensors of another shape or with values that are not finite, and a negative Λ, are refused.
    """
    if anchors is not None and name not in anchors:
        raise InputError(f"the anchor lacks {name!r}, which has a Fisher; pass its anchor too")
    anchor = parameter if anchors is None else anchors[name]
    for kind, tensor in (("Fisher", fisher), ("anchor", anchor)):
        if tensor.shape != parameter.shape:
            raise InputError(
                f"the {kind} of {name!r} has shape {tuple(tensor.shape)}: expected "
                f"{tuple(parameter.shape)} as the parameter; use the Fisher of this model"
            )
        least, most = _range(local(tensor))
        found = [not (math.isfinite(least) and math.isfinite(most)), least < 0]
        if is_cut(tensor):  # All processes refuse together.
            of_part = torch.tensor(found, dtype=torch.float32, device=tensor.device)
            found = [total > 0 for total in sum_of_parts(of_part, tensor).tolist()]
        infinite, negative = found
        if infinite:
            raise NonFiniteError(
                f"the {kind} of {name!r} has values that are NaN or infinite: found {least:.3g} to "
                f"{most:.3g}"
            )
        if negative and kind == "Fisher":
            raise InputError(
                f"the Fisher of {name!r} has negative values, found {least:.3g}; measure it again"
            )
    return cut_like(fisher.detach(), parameter), cut_like(anchor.detach(), parameter)


def _range(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the largest value, found in one sweep; both are NaN if any value is."""
    if not tensor.numel():
        return 0.0, 0.0
    least, most = tensor.aminmax()
    return least.item(), most.item()


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the memory that tensors are in."""
    return {local(tensor).untyped_storage().data_ptr() for tensor in tensors}


def kept(
    tensor: Tensor,
    parameter: nn.Parameter,
    dtype: torch.dtype | None,
    device: torch.device,
    live: set[int],
) -> Tensor:
    """Convert Λ or μ of a parameter; copy a tensor whose memory is live, as the parameters' is."""
    shared = tensor.untyped_storage().data_ptr() in live
    widest = wide(parameter.dtype)
    # A narrower dtype takes less memory, and is widened exactly on use.
    fits = torch.promote_types(tensor.dtype, widest) == widest
    return converted(tensor, device, dtype or (tensor.dtype if fits else widest), copy=shared)


def converted(
    tensor: Tensor, device: torch.device, dtype: torch.dtype, *, copy: bool = False
) -> Tensor:
    """Move a tensor as `Tensor.to` does; an expanded single number stays a single number."""
    if tensor.dim() and not any(tensor.stride()):  # one number for all, as in l2
        return tensor.as_strided((), ()).to(device, dtype, copy=copy).expand(tensor.shape)
    return tensor.to(device, dtype, copy=copy)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a parameter's penalty is computed in: float32, or its own if wider."""
    return torch.promote_types(dtype, torch.float32)
