"""Gaussian processes over one-hot codes, and which archs promise most."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy.linalg import LinAlgError, cho_solve, cholesky
from scipy.optimize import minimize

_STEPS = 60
"""Of the optimizer of a process's length scales."""
_SAMPLES = 512
"""Of the posterior, for the improvement of several archs together."""
_JITTER = 1e-6
_NOISE = -4.0, 1.0
"""Mean and deviation of the logarithm of the noise's variance, before anything is known; targets have variance 1."""


class Process:
    """A process of one objective: a Gaussian kernel with a length scale for each feature, and noise.

    What is most probable given the targets and a prior of scales that grow with the number of features (Hvarfner et
    al. 2024, arXiv:2402.02229, eq. 5); the mean is that of the most likely constant.

    rows: features (archs, features); targets: (archs,), of about variance 1
    scales, noise: what was fitted, the noise as a variance
    """

    def __init__(self, rows: np.ndarray, targets: np.ndarray) -> None:
        features = max(1, rows.shape[1])
        self.rows, self._targets = rows, targets
        self._prior = np.sqrt(2) + np.log(features) / 2, np.sqrt(3)
        start = np.append(np.full(rows.shape[1], self._prior[0] - self._prior[1] ** 2), _NOISE[0] - _NOISE[1] ** 2)
        low, high = np.log(1e-2), np.log(1e3)
        bounds = [*[(low, high)] * rows.shape[1], (np.log(1e-4), np.log(10))]
        found = minimize(self._loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": _STEPS})
        self._set(found.x)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the posterior mean and deviation of archs."""
        near = self._near(rows)
        variances = 1 - ((near @ self._inverse) * near).sum(axis=1)
        return self.mean + near @ self._weights, np.sqrt(np.maximum(variances, 1e-12))

    def samples(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return joint samples of the posterior of some archs, (samples, archs)."""
        near = self._near(rows)
        covariance = _kernel(rows / self.scales, rows / self.scales) - near @ self._inverse @ near.T
        root = _root(covariance, _JITTER)
        return self.mean + near @ self._weights + rng.standard_normal((_SAMPLES, len(rows))) @ root.T

    @cached_property
    def _scaled(self) -> np.ndarray:
        return self.rows / self.scales

    def _near(self, rows: np.ndarray) -> np.ndarray:
        return _kernel(rows / self.scales, self._scaled)

    def _set(self, found: np.ndarray) -> None:
        """Take what was fitted."""
        self.scales, self.noise = np.exp(found[:-1]), float(np.exp(found[-1]))
        factor = _root(_kernel(self._scaled, self._scaled), self.noise)
        self._inverse = cho_solve((factor, True), np.eye(len(factor)))
        self.mean = _centre(self._inverse, self._targets)
        self._weights = self._inverse @ (self._targets - self.mean)

    def _loss(self, given: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the negative logarithm of the posterior of scales and noise, up to a constant, and its gradient."""
        scales, noise = np.exp(given[:-1]), np.exp(given[-1])
        scaled = self.rows / scales
        kernel = _kernel(scaled, scaled)
        factor = _root(kernel, noise)
        inverse = cho_solve((factor, True), np.eye(len(factor)))
        off = self._targets - _centre(inverse, self._targets)
        weights = inverse @ off
        means = np.append(np.full(len(scales), self._prior[0]), _NOISE[0])
        deviations = np.append(np.full(len(scales), self._prior[1]), _NOISE[1])
        loss = off @ weights / 2 + np.log(np.diag(factor)).sum()
        loss += (((given - means) / deviations) ** 2 / 2 + given).sum()
        slope = inverse - np.outer(weights, weights)  # of the loss by the covariance, twice
        # the squared difference of two archs in a feature, weighed by how the kernel of both counts, without a
        # matrix for each feature
        pull = slope * kernel
        gradient = pull.sum(axis=1) @ scaled**2 - ((pull @ scaled) * scaled).sum(axis=0)
        gradient = np.append(gradient, noise * np.trace(slope) / 2)
        return float(loss), gradient + (given - means) / deviations**2 + 1


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the Gaussian kernel of rows whose scales are 1, (first, second)."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.exp(-np.maximum(squares, 0) / 2)


def _root(matrix: np.ndarray, added: float) -> np.ndarray:
    """Return the lower Cholesky factor of a matrix with something added to its diagonal, more if that is too little."""
    while True:
        try:
            return cholesky(matrix + added * np.eye(len(matrix)), lower=True)
        except LinAlgError:
            added = 10 * added


def _centre(inverse: np.ndarray, targets: np.ndarray) -> float:
    weights = inverse.sum(axis=0)
    return float(weights @ targets / weights.sum())


def chosen(worth: np.ndarray, best: np.ndarray, n: int, pending: int) -> list[int]:
    """Return which n candidates improve most together, one after the other, and beside those that are pending.

    worth: joint samples (samples, candidates and then pending ones); best: what is reached already, (samples,)
    """
    candidates = worth.shape[1] - pending
    best = np.maximum(best, worth[:, candidates:].max(axis=1, initial=-np.inf))
    worth, found = worth[:, :candidates].copy(), []
    means = 1e-9 * worth.mean(axis=0)  # where nothing improves
    for _ in range(min(n, candidates)):
        gains = np.maximum(worth - best[:, None], 0).mean(axis=0) + means
        gains[found] = -np.inf
        found.append(int(gains.argmax()))
        best = np.maximum(best, worth[:, found[-1]])
    return found


def volume_in_direction(gains: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return how far along a direction archs dominate, to the power of the number of objectives.

    The largest over a set of archs, and the mean over directions that are uniform on the positive part of the sphere,
    is the set's hypervolume but for a factor (Golovin & Zhang 2020, arXiv:2006.04655, lemma 5).

    gains: (samples, archs, objectives) above the point that it is counted from; directions: (samples, objectives)
    """
    reach = (gains / directions[:, None]).min(axis=2)
    return np.maximum(reach, 0) ** gains.shape[2]
