import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from consolidate.estimation.likelihoods import get_likelihood
from consolidate.training.evaluation import divergence, measure
from formats.errors import InputError, NonFiniteError


def test_unequal_batches_give_the_mean_over_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    outputs = model[0](x)
    found = measure(model, zip(x.split(3), y.split(3), strict=True), get_likelihood("softmax"))
    assert found["loss"] == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-6)
    assert found["accuracy"] == float((outputs.argmax(1) == y).double().mean())
    assert found["score"] == found["accuracy"]
    assert model[1].training


def test_language_models_get_perplexity_over_tokens() -> None:
    model = nn.Embedding(5, 5)
    ids = torch.tensor([[1, 2, 3, 4], [2, 2, 0, 0]])
    labels = ids.clone()
    labels[1, 2:] = -100
    found = measure(model, [(ids, labels)], get_likelihood("next-token-softmax"), language=True)
    logits = model(ids)[:, :-1].flatten(0, 1)
    loss = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert "accuracy" not in found
    assert found["score"] == -found["loss"]


def test_regression_scores_by_its_loss() -> None:
    model = nn.Linear(2, 1)
    found = measure(model, [(torch.ones(3, 2), torch.zeros(3))], get_likelihood("gaussian"))
    assert set(found) == {"loss", "score"}
    assert found["score"] == -found["loss"]


def test_the_divergence_is_that_of_two_copies_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    new = copy.deepcopy(old).train()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    before = copy.deepcopy(new.state_dict())
    values = {name: t.clone() for name, t in old.state_dict().items()}
    found = divergence(
        new, values, zip(x.split(3), y.split(3), strict=True), get_likelihood("softmax")
    )
    assert all(module.training for module in new.modules())
    assert all(torch.equal(new.state_dict()[name], t) for name, t in before.items())
    assert all(torch.equal(old.state_dict()[name], t) for name, t in values.items())
    p, q = (torch.distributions.Categorical(logits=m.eval()(x)) for m in (old, new))
    expected = torch.distributions.kl_divergence(p, q).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_nothing_to_predict_is_said() -> None:
    labels = torch.full((2, 3), -100)
    with pytest.raises(InputError, match="nothing to predict"):
        measure(
            nn.Embedding(4, 4),
            [(torch.ones(2, 3, dtype=torch.long), labels)],
            get_likelihood("token-softmax"),
        )


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="the loss is inf"):
        measure(
            nn.Linear(1, 1),
            [(torch.full((1, 1), 1e30), torch.zeros(1))],
            get_likelihood("gaussian"),
        )
