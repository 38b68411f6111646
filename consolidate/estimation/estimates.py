"""A Fisher diagonal, with its blocks and the counts and options of its estimate."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field

import torch
from torch import Tensor

from formats.fisher_json import Block


@dataclass(eq=False, repr=False)
class FisherDiagonal(dict[str, Tensor]):
    """The Fisher diagonal by parameter name, in the parameters' shapes, with its counts beside it.

    Attributes:
        examples: How many examples were read.
        units: How many units the sum was divided by: examples, or predicted tokens.
        estimator: One of ESTIMATORS.
        mc_samples: Sampled outcomes per example; None where nothing is sampled.
        seed: The seed of the sampled outcomes.
        unreached: Names of parameters that no output depended on; their Fisher is zero.
        methods: How the per-example gradients of each other parameter were computed, one of
            METHODS; empty for `batched`.
        relative_errors: The relative standard error of each tensor's trace, from the spread over
            the examples, or every fourth of a batch where a layer has many positions (`batched`:
            over the batches); infinite where there was only one, missing where the trace is zero
            or below 10⁻⁷ of the whole: rounding noise, such as that of BERT's key biases.
        factors: With the structure `inputs`, the matrix R of each covered layer by block name,
            (n, n), exactly symmetric; else empty.
        blocks: The layer's parameters, and the dimensions of its weight that R ranges over, by the
            same names.
    """

    tensors: InitVar[Mapping[str, Tensor]]
    _: KW_ONLY
    examples: int
    units: int
    estimator: str
    mc_samples: int | None
    seed: int
    unreached: list[str]
    methods: dict[str, str]
    relative_errors: dict[str, float]
    factors: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)

    def __post_init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.update(tensors)

    def trace(self) -> dict[str, float]:
        """Return the sum of each tensor, by parameter name."""
        return {name: tensor.cpu().sum(dtype=torch.float64).item() for name, tensor in self.items()}
