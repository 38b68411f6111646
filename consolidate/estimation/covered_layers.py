"""Which layers have a matrix over their inputs beside the diagonal, by the model's structure."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from consolidate.estimation.input_blocks import InputBlock, width
from consolidate.estimation.layer_rules import convolution, linear, rule_of

LARGEST = 4  # times the elements of its weight that a matrix may have


def covered_layers(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[str, InputBlock]:
    """Return the blocks of the layers that have one, by name: the weight's, and `.R`.

    These are linear layers and convolutions without groups, whose weight is among the parameters
    and belongs to one module only, and whose matrix has at most LARGEST times its elements. The
    structure of the model decides, not how its gradients are computed.
    """
    names = {id(p): name for name, p in parameters.items()}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    blocks: dict[str, InputBlock] = {}
    for module in model.modules():
        weight, bias = (module._parameters.get(local) for local in ("weight", "bias"))
        measured = [p for p in (weight, bias) if id(p) in names and owners[id(p)] == 1]
        if weight is None or not measured or measured[0] is not weight:
            continue
        dims = _input_dims(module, weight)
        if dims and 0 < width(weight, dims) ** 2 <= LARGEST * weight.numel():
            of_layer = tuple(names[id(p)] for p in measured)
            blocks[f"{of_layer[0]}.R"] = InputBlock(of_layer, dims)
    return blocks


def _input_dims(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a layer's weight that its inputs have; none without such a rule."""
    rule = rule_of(module)
    if isinstance(rule, partial):
        return (0,) if rule.func is linear else ()
    if rule is linear:
        return (1,)
    return tuple(range(1, weight.ndim)) if rule is convolution and module.groups == 1 else ()
