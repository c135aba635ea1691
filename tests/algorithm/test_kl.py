"""The estimators against exact expectations over a vocabulary."""

import numpy as np
import pytest
import torch

from rloop_mcore.algorithm.kl import kl_estimate

KINDS = ("k1", "k2", "k3")


def divergence(p, q):
    """KL(p || q) of logprobs [vocabulary]."""
    return (p.exp() * (p - q)).sum()


def random_policies(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_values_match_numpy(kind):
    random = np.random.default_rng(0)
    p, ref = random.normal(-2, 1, (2, 3, 50))
    expected = {"k1": p - ref, "k2": 0.5 * (p - ref) ** 2, "k3": np.exp(ref) / np.exp(p) - 1 - (ref - p)}[kind]
    np.testing.assert_allclose(kl_estimate(torch.tensor(p), torch.tensor(ref), kind).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased(kind, seed):
    logits, reference = random_policies(seed)
    logprobs = logits.detach().log_softmax(-1)
    expectation = (logprobs.exp() * kl_estimate(logprobs, reference, kind)).sum()
    assert expectation.item() == pytest.approx(divergence(logprobs, reference).item())


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_are_what_the_docstring_says(seed):
    logits, reference = random_policies(seed)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0].numpy()

    def expected_gradient(kind):
        """Over tokens drawn from the policy: the probabilities are weights, not part of the loss."""
        logprobs = logits.log_softmax(-1)
        return gradient((logprobs.detach().exp() * kl_estimate(logprobs, reference, kind)).sum())

    reverse = gradient(divergence(logits.log_softmax(-1), reference))
    forward = gradient(divergence(reference, logits.log_softmax(-1)))
    np.testing.assert_allclose(expected_gradient("k1"), 0.0, atol=1e-12)
    np.testing.assert_allclose(expected_gradient("k2"), reverse, atol=1e-12)
    np.testing.assert_allclose(expected_gradient("k3"), forward, atol=1e-12)
    assert abs(reverse - forward).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_absurd_ratios_give_finite_values_and_gradients(kind):
    logprobs = torch.tensor([-1e4, -100.0, -1e-4, 0.0], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([0.0, 0.0, -1e4, -100.0]), kind)
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    assert torch.isfinite(estimate).all()
    assert torch.isfinite(gradient).all()


def test_k3_stays_exact_where_the_reference_has_almost_no_probability():
    logprobs = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([-60.5], dtype=torch.float64), "k3")
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    assert estimate.item() == pytest.approx(59.0)
    assert gradient.item() == pytest.approx(1.0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
