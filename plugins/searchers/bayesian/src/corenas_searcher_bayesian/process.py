"""Gaussian processes over one-hot codes, and which archs promise most."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.optim import optimize_acqf_discrete
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

_STEPS = 60
"""Of the optimizer of a process's length scales; one for each feature, with a prior that suits many of them."""
_SAMPLES = 32
"""Of the posterior, for the improvement of several archs together."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator for a while; what BoTorch says of scales and of steps that ran out is not heard."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


class Process:
    """A process for each objective, fitted to standardised gains.

    rows: features (archs, features); gains: (archs, objectives), more is better
    Posterior means and deviations are in the same standardised terms.
    """

    def __init__(self, rows: np.ndarray, gains: np.ndarray) -> None:
        spread = gains.std(axis=0)
        self.gains = torch.tensor((gains - gains.mean(axis=0)) / np.where(spread > 0, spread, 1.0))
        self.rows = torch.tensor(rows, dtype=torch.double)
        columns = [self.gains[:, [at]] for at in range(gains.shape[1])]
        self.models = [SingleTaskGP(self.rows, column, outcome_transform=None) for column in columns]
        for model in self.models:
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
            fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": _STEPS}})
        self.model = self.models[0] if len(self.models) == 1 else ModelListGP(*self.models)

    def bound(self, rows: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
        """Return weighted upper confidence bounds of archs: means and so many deviations."""
        with torch.no_grad():
            posteriors = [model.posterior(torch.tensor(rows, dtype=torch.double)) for model in self.models]
            bounds = [p.mean[:, 0] + width * p.variance[:, 0].sqrt() for p in posteriors]
        return sum((w * bound.numpy() for w, bound in zip(weights, bounds, strict=True)), start=np.zeros(len(rows)))

    def choose(self, rows: np.ndarray, n: int, pending: np.ndarray, seed: int) -> Sequence[int]:
        """Return which n of some archs promise most together, beside those that are pending."""
        choices = torch.tensor(rows, dtype=torch.double)
        waiting = torch.tensor(pending, dtype=torch.double) if len(pending) else None
        sampler = SobolQMCNormalSampler(torch.Size([_SAMPLES]), seed=seed)
        if len(self.models) == 1:
            with torch.no_grad():
                best = self.model.posterior(self.rows).mean.max()  # of what was measured, without its noise
            acquisition = qLogExpectedImprovement(self.model, best, sampler=sampler, X_pending=waiting)
        else:
            acquisition = qLogNoisyExpectedHypervolumeImprovement(
                self.model,
                ref_point=self._reference(),
                X_baseline=self.rows,
                sampler=sampler,
                X_pending=waiting,
                prune_baseline=True,
            )
        with torch.no_grad():
            found, _ = optimize_acqf_discrete(acquisition, q=n, choices=choices, unique=True)
        return [int((choices == row).all(dim=1).nonzero()[0, 0]) for row in found]

    def _reference(self) -> Tensor:
        """Return the point that hypervolume is counted from: a tenth of the range below the worst of each objective."""
        worst, best = self.gains.min(dim=0).values, self.gains.max(dim=0).values
        return worst - 0.1 * (best - worst)
