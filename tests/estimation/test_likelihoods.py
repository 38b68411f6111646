import pytest
import torch
from torch import Tensor

from consolidate.estimation.likelihoods import LIKELIHOODS, Softmax, get_likelihood
from consolidate.runtime.randomness import uniforms
from formats.errors import InputError, UsageError
from support.reference import REFERENCE

torch.manual_seed(0)
X = -100
CASES: dict[str, tuple[Tensor, Tensor]] = {
    "softmax": (torch.randn(3, 4), torch.tensor([0, 3, 1])),
    "bernoulli": (torch.randn(3, 3), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]])),
    "gaussian": (torch.randn(3, 2), torch.randn(3, 2)),
    "token-softmax": (torch.randn(3, 3, 3), torch.tensor([[0, 2, 1], [X, 1, X], [X, X, X]])),
    "next-token-softmax": (
        torch.randn(3, 4, 3),
        torch.tensor([[0, 1, X, 2], [X, X, 0, 1], [1, X, X, X]]),
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[Tensor, Tensor]:
    outputs, labels = CASES[name]
    return outputs.double(), labels


def scores_of(name: str, output: Tensor, label: Tensor) -> Tensor:
    output = output.clone().requires_grad_()
    return torch.autograd.grad(REFERENCE[name][0](output, label), output)[0].flatten()


def covariance(name: str, output: Tensor, label: Tensor) -> Tensor:
    """E_y[s sᵀ] over all outcomes."""
    log_p, outcomes = REFERENCE[name]
    if outcomes is None:
        return torch.eye(output.numel(), dtype=torch.float64)
    total = torch.zeros(output.numel(), output.numel(), dtype=torch.float64)
    for y in outcomes(output, label):
        score = scores_of(name, output, y)
        total += log_p(output, y).exp() * torch.outer(score, score)
    return total


def test_there_are_five():
    assert list(LIKELIHOODS) == list(REFERENCE)
    assert get_likelihood("softmax") is LIKELIHOODS["softmax"]
    own = Softmax("my own")
    assert get_likelihood(own) is own
    with pytest.raises(UsageError, match=r"'poisson'.*softmax, bernoulli, gaussian"):
        get_likelihood("poisson")


@EVERY
def test_divergence_is_the_expected_difference_of_log_p(name):
    outputs, labels = case(name)
    others = outputs + torch.randn(outputs.shape, dtype=outputs.dtype)
    log_p, outcomes = REFERENCE[name]
    expected = []
    for old, new, label in zip(outputs, others, labels, strict=True):
        if outcomes is None:
            expected.append(((old - new) ** 2).sum() / 2)
            continue
        terms = [
            log_p(old, y).exp() * (log_p(old, y) - log_p(new, y)) for y in outcomes(old, label)
        ]
        expected.append(sum(terms, torch.zeros((), dtype=torch.float64)))
    found = LIKELIHOODS[name].divergence(outputs, others, labels)
    torch.testing.assert_close(found, torch.stack(expected))


@EVERY
def test_loss_is_minus_log_p(name):
    outputs, labels = case(name)
    expected = [-REFERENCE[name][0](o, y) for o, y in zip(outputs, labels, strict=True)]
    found = LIKELIHOODS[name].negative_log_likelihood(outputs, labels)
    torch.testing.assert_close(found, torch.stack(expected))


@EVERY
def test_observed_scores_are_the_gradient_of_log_p(name):
    outputs, labels = case(name)
    found = LIKELIHOODS[name].observed_scores(outputs, labels)
    assert found.shape == outputs.shape
    for i, (o, y) in enumerate(zip(outputs, labels, strict=True)):
        torch.testing.assert_close(found[i].flatten(), scores_of(name, o, y))
    outputs.requires_grad_()
    loss = LIKELIHOODS[name].negative_log_likelihood(outputs, labels).sum()
    torch.testing.assert_close(-torch.autograd.grad(loss, outputs)[0], found)


@EVERY
def test_exact_scores_have_the_covariance_of_the_score(name):
    outputs, labels = case(name)
    likelihood = LIKELIHOODS[name]
    vectors = torch.stack(list(likelihood.exact_scores(outputs, labels)))
    assert vectors.shape[1:] == outputs.shape
    assert len(vectors) <= likelihood.outcomes(outputs, labels)
    for i, (o, y) in enumerate(zip(outputs, labels, strict=True)):
        v = vectors[:, i].flatten(1)
        torch.testing.assert_close(v.T @ v, covariance(name, o, y))


@EVERY
def test_sampled_scores_have_mean_zero_and_that_covariance(name):
    outputs, labels = case(name)
    n = 20_000
    likelihood = LIKELIHOODS[name]
    for i in range(len(outputs)):
        o, y = outputs[i].expand(n, *outputs[i].shape), labels[i].expand(n, *labels[i].shape)
        u = uniforms(i, torch.arange(n), likelihood.draws(o))
        s = likelihood.sampled_scores(o, y, u).flatten(1)
        assert s.mean(0).abs().max() < 5 / n**0.5
        expected = covariance(name, outputs[i], labels[i])
        assert (s.T @ s / n - expected).abs().max() < 10 / n**0.5


def test_token_scores_do_not_depend_on_padding():
    likelihood = LIKELIHOODS["token-softmax"]
    outputs = torch.randn(1, 3, 5)
    padding = torch.randn(1, 2, 5)
    labels, ignored = torch.tensor([[1, X, 4]]), torch.tensor([[X, X]])
    alone = likelihood.sampled_scores(outputs, labels, uniforms(0, torch.tensor([8]), 3))
    u = uniforms(0, torch.tensor([8]), 5)
    right = likelihood.sampled_scores(
        torch.cat([outputs, padding], 1), torch.cat([labels, ignored], 1), u
    )
    left = likelihood.sampled_scores(
        torch.cat([padding, outputs], 1), torch.cat([ignored, labels], 1), u
    )
    assert torch.equal(right[:, :3], alone)
    assert torch.equal(left[:, 2:], alone)
    assert not right[:, 3:].any()
    assert not left[:, :2].any()


def test_impossible_classes_are_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]], dtype=torch.float32)
    u = torch.tensor([2.0**-53, 0.4999999, 0.5, 0.5000001, 1 - 2.0**-53], dtype=torch.float64)
    scores = LIKELIHOODS["softmax"].sampled_scores(
        logits.expand(5, 4), torch.zeros(5).long(), u[:, None]
    )
    drawn = (scores > 0).nonzero()[:, 1].tolist()
    assert set(drawn) == {0, 2}
    assert drawn[0] == 0
    assert drawn[-1] == 2


def test_rare_classes_of_a_large_vocabulary_are_drawn():
    # Each is less likely than the last bit of a float32 near 1.
    logits = torch.full((1, 100_000), -18.0)
    logits[0, 0] = 0
    rare = logits.double().softmax(-1)[0, 1]
    u = (1 - rare * (50_000.5 - torch.arange(10, dtype=torch.float64)))[:, None]
    scores = LIKELIHOODS["softmax"].sampled_scores(logits.expand(10, -1), torch.zeros(10).long(), u)
    drawn = scores.argmax(-1)
    assert drawn.diff().tolist() == 9 * [1]
    assert abs(drawn[0].item() - 50_000) < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_outputs_keep_their_small_variances(dtype):
    # √p (1 − p) loses 1 − p in float32 once p rounds to 1.
    outputs = torch.tensor([[25.0, 0.0, -400.0], [0.0, 25.0, -400.0]], dtype=dtype)
    labels = torch.tensor([0, 1])
    v = torch.stack(list(LIKELIHOODS["softmax"].exact_scores(outputs, labels))).double()
    q = torch.tensor(-25.0).double().exp() / (1 + torch.tensor(-25.0).double().exp())
    for i in range(2):
        found = v[:, i].T @ v[:, i]
        torch.testing.assert_close(found[0, 0], q * (1 - q), rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1, 1], q * (1 - q), rtol=1e-5, atol=0)
        torch.testing.assert_close(found[0, 1], -q * (1 - q), rtol=1e-5, atol=0)
    outputs = torch.tensor([[40.0, -40.0]], dtype=dtype)
    v = torch.stack(list(LIKELIHOODS["bernoulli"].exact_scores(outputs, outputs.clamp(0, 1))))
    expected = torch.eye(2, dtype=dtype) * torch.tensor(-20.0, dtype=dtype).exp()
    torch.testing.assert_close(v[:, 0], expected, rtol=1e-5, atol=0)


def test_units_correct_and_outcomes():
    likelihood = LIKELIHOODS["softmax"]
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert likelihood.units(torch.tensor([0, 0])).tolist() == [1, 1]
    assert likelihood.correct(outputs, torch.tensor([0, 0])).tolist() == [1, 0]
    assert likelihood.outcomes(outputs, torch.tensor([0, 0])) == 2

    outputs, labels = CASES["bernoulli"]
    likelihood = LIKELIHOODS["bernoulli"]
    assert likelihood.units(labels).tolist() == [1, 1, 1]
    assert likelihood.correct(labels - 0.5, labels).tolist() == [1, 1, 1]
    assert likelihood.correct((labels - 0.5) * torch.tensor([1, 1, -1]), labels).tolist() == [
        0,
        0,
        0,
    ]
    assert likelihood.outcomes(outputs, labels) == 3

    outputs, labels = CASES["gaussian"]
    likelihood = LIKELIHOODS["gaussian"]
    assert likelihood.units(labels).tolist() == [1, 1, 1]
    assert likelihood.correct(outputs, labels) is None
    assert likelihood.outcomes(outputs, labels) == 2

    outputs, labels = CASES["token-softmax"]
    likelihood = LIKELIHOODS["token-softmax"]
    assert likelihood.units(labels).tolist() == [3, 1, 0]
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 3).float()
    assert likelihood.correct(one_hot, labels).tolist() == [3, 1, 0]
    assert likelihood.outcomes(outputs, labels) == 9
    assert likelihood.outcomes(outputs[1:], labels[1:]) == 3

    outputs, labels = CASES["next-token-softmax"]
    likelihood = LIKELIHOODS["next-token-softmax"]
    assert likelihood.units(labels).tolist() == [2, 2, 0]
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 3).float()
    assert likelihood.correct(one_hot.roll(-1, 1), labels).tolist() == [2, 2, 0]
    assert likelihood.outcomes(outputs, labels) == 9


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_one_number_per_example_may_come_as_a_column_or_not(shape):
    likelihood = LIKELIHOODS["gaussian"]
    outputs, labels = torch.randn(shape), torch.randn(5)
    likelihood.check_labels(outputs, labels)
    loss = likelihood.negative_log_likelihood(outputs, labels)
    torch.testing.assert_close(loss, (outputs.flatten() - labels) ** 2 / 2)
    assert likelihood.observed_scores(outputs, labels).shape == shape
    (vector,) = likelihood.exact_scores(outputs, labels)
    assert torch.equal(vector, torch.ones(shape))
    u = uniforms(0, torch.arange(5), likelihood.draws(outputs))
    assert likelihood.sampled_scores(outputs, labels, u).shape == shape


@EVERY
def test_narrow_outputs_are_computed_in_float32(name):
    outputs, labels = CASES[name]
    narrow = outputs.bfloat16()
    likelihood = LIKELIHOODS[name]
    loss = likelihood.negative_log_likelihood(narrow, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, likelihood.negative_log_likelihood(narrow.float(), labels))
    u = uniforms(0, torch.arange(3), likelihood.draws(narrow))
    for function in (
        lambda o: likelihood.observed_scores(o, labels),
        lambda o: likelihood.sampled_scores(o, labels, u),
        lambda o: torch.stack(list(likelihood.exact_scores(o, labels))),
    ):
        assert function(narrow).dtype == torch.bfloat16
        assert torch.equal(function(narrow), function(narrow.float()).bfloat16())


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "message"),
    [
        ("softmax", (3, 4), torch.tensor([0, 1, 4]), r"label 4 \(example 2.*0 to 3.*4 outputs"),
        ("softmax", (3, 4), torch.tensor([0, -100, 1]), r"label -100 \(example 1"),
        ("softmax", (3, 4), torch.tensor([0.0, 1.0, 2.0]), "integer labels, found torch.float32"),
        ("softmax", (3, 4), torch.tensor([0, 1]), r"shape \(3,\).*found \(2,\)"),
        ("softmax", (3, 4, 5), torch.tensor([0, 1, 2]), r"\(examples, classes\).*\(3, 4, 5\)"),
        ("softmax", (3,), torch.tensor([0, 1, 2]), r"\(examples, classes\)"),
        ("token-softmax", (1, 2, 4), torch.tensor([[-100, 7]]), r"example 0.*position 1\)"),
        ("token-softmax", (1, 2, 4), torch.tensor([[-1, 0]]), "label -1"),
        ("next-token-softmax", (1, 2, 4), torch.tensor([[9, 0]]), "label 9"),
        ("bernoulli", (2, 2), torch.tensor([[0, 1], [0, 2]]), "label 1 of example 1.* is 2"),
        ("bernoulli", (2, 2), torch.tensor([0, 1]), r"shape \(2, 2\)"),
        ("bernoulli", (2, 2, 2), torch.zeros(2, 2, 2), r"\(examples, labels\)"),
        ("gaussian", (2, 2), torch.zeros(2, 3), r"shape \(2, 2\).*found \(2, 3\)"),
        ("gaussian", (2, 2), torch.zeros(4), r"shape \(2, 2\).*found \(4,\)"),
        ("gaussian", (2, 1), torch.tensor([0.0, torch.nan]), "example 1.*not finite"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(name, outputs, labels, message):
    with pytest.raises(InputError, match=message):
        LIKELIHOODS[name].check_labels(torch.zeros(outputs), labels)


@EVERY
def test_labels_that_fit_are_taken(name):
    LIKELIHOODS[name].check_labels(*CASES[name])
    if name == "bernoulli":
        LIKELIHOODS[name].check_labels(CASES[name][0], CASES[name][1].float())


def test_a_score_of_every_outcome_averages_to_zero():
    for name, (outputs, labels) in ((n, case(n)) for n in CASES if n != "gaussian"):
        log_p, outcomes = REFERENCE[name]
        for o, y in zip(outputs, labels, strict=True):
            total = sum(
                log_p(o, k).exp() * LIKELIHOODS[name].observed_scores(o[None], k[None])
                for k in outcomes(o, y)
            )
            assert total.abs().max() < 1e-12
