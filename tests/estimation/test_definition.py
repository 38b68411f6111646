"""The definition, against the Fisher of a logistic regression worked out by hand."""

import torch
from torch import nn

from consolidate.estimation.definition import fisher_by_definition
from consolidate.estimation.fisher_diagonal import fisher_diagonal


def test_the_definition_is_the_closed_form_of_a_logistic_regression() -> None:
    """F of w_ci is Σ_x p_c (1 − p_c) x_i², as the score of class c is (1_y − p) xᵀ."""
    torch.manual_seed(0)
    model, unused = nn.Linear(4, 3).double(), nn.Parameter(torch.ones(2))
    inputs = torch.randn(5, 4, dtype=torch.float64)
    found = fisher_by_definition(
        lambda x, y: model(x).log_softmax(0)[y],
        {**dict(model.named_parameters()), "unused": unused},
        [(x, range(3)) for x in inputs],
    )
    p = model(inputs).softmax(1).detach()
    spread = p * (1 - p)
    torch.testing.assert_close(found["weight"], spread.T @ inputs**2)
    torch.testing.assert_close(found["bias"], spread.sum(0))
    assert torch.equal(found["unused"], torch.zeros(2))
    fast = fisher_diagonal(model, [(inputs, torch.zeros(5, dtype=torch.long))], "softmax")
    torch.testing.assert_close(fast["weight"].double(), found["weight"] / 5, rtol=1e-5, atol=0)
