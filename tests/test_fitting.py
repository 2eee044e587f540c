"""Linear fits, many at a time, against scikit-learn's, one at a time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from mechinterp.analyzers.fitting import logistic, ridge


def problems(classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Skewed features of very different size, labels that they partly tell, and four sets of rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(90, 12, generator=g) @ torch.randn(12, 12, generator=g)
    x = x * torch.logspace(-2, 2, 12) + 5 * torch.arange(12)
    z = (x - x.mean(0)) / x.std(0)
    scores = z @ torch.randn(12, classes, generator=g) + torch.randn(90, classes, generator=g)
    y = scores.argmax(1)
    rows = torch.rand(4, 90, generator=g) > 0.3
    return x, y.expand(4, -1).clone(), rows


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_a_fit_is_that_of_scikit_learn(classes: int, c: float) -> None:
    x, labels, rows = problems(classes)
    labels[3] = labels[3].flip(0)  # fits may have labels of their own
    labels[:, :2] = torch.where(rows[:, :2], labels[:, :2], 99)  # and what they do not see may be anything
    fits = logistic(x, labels, rows, classes, c)
    assert fits.converged.all()
    for i, some in enumerate(rows):
        scaler = StandardScaler().fit(x[some].double().numpy())
        z, y = scaler.transform(x[some].double().numpy()), labels[i, some].numpy()
        theirs = LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(z, y)
        ours, wanted = fits.scores(x[some])[:, i].double().numpy(), theirs.decision_function(z)
        wanted = wanted[:, None] if classes == 2 else wanted - wanted.mean(1, keepdims=True)
        ours = ours if classes == 2 else ours - ours.mean(1, keepdims=True)
        if c <= 1:  # with hardly a penalty, weights far apart have objectives close together
            np.testing.assert_allclose(ours, wanted, atol=1e-2, rtol=1e-2)
        logits = theirs.decision_function(z)
        both = np.stack([0 * logits, logits], 1) if classes == 2 else logits
        lost = (np.logaddexp.reduce(both, 1) - both[np.arange(len(y)), y]).sum()
        least = c * lost + 0.5 * float((theirs.coef_**2).sum())
        assert float(fits.objective[i]) == pytest.approx(least, rel=1e-5 if c <= 1 else 1e-4)


def test_fits_do_not_touch_each_other() -> None:
    x, labels, rows = problems(3)
    together = logistic(x, labels, rows, 3)
    for i in range(4):
        alone = logistic(x, labels[i : i + 1], rows[i : i + 1], 3)
        torch.testing.assert_close(alone.weight[0], together.weight[i], atol=1e-3, rtol=1e-2)


def test_classes_that_a_line_parts_still_have_an_optimum() -> None:
    x = torch.cat([torch.randn(20, 5) + 10, torch.randn(20, 5) - 10])
    labels, rows = torch.arange(40)[None] // 20, torch.ones(1, 40, dtype=torch.bool)
    fits = logistic(x, labels, rows, 2, 1000.0)
    assert fits.converged.all() and torch.isfinite(fits.weight).all()
    assert ((fits.scores(x)[:, 0, 0] > 0).long() == labels[0]).all()


def test_a_constant_feature_changes_nothing() -> None:
    x, labels, rows = problems(2)
    wide = torch.cat([x, torch.full((90, 1), 3.0)], 1)
    ours = logistic(wide, labels, rows, 2)
    assert (ours.weight[..., -1].abs() < 1e-6).all()
    torch.testing.assert_close(ours.objective, logistic(x, labels, rows, 2).objective, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_ridge_is_that_of_scikit_learn(c: float) -> None:
    x, labels, rows = problems(2)
    targets = torch.randn(4, 90, generator=torch.Generator().manual_seed(1)) + labels
    rows[2] = rows[1]  # two fits of one set of rows
    fits = ridge(x, targets, rows, c)
    for i, some in enumerate(rows):
        scaler = StandardScaler().fit(x[some].double().numpy())
        theirs = Ridge(alpha=1 / c).fit(scaler.transform(x[some].double().numpy()), targets[i, some].numpy())
        expected = theirs.predict(scaler.transform(x.double().numpy()))
        np.testing.assert_allclose(fits.scores(x)[:, i, 0].numpy(), expected, atol=1e-3)
