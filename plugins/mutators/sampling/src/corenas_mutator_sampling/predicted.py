"""What archs lose, predicted from their choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from corenas.features import Features
from corenas.space import Codes, SearchSpace

_RIDGE = 1.0
"""In units of archs: how many that say nothing stand beside those that say something."""


@frozen(eq=False)
class LossPredictor:
    """Ridge regression of losses on choices.

    features: of archs
    coefficients: of each feature
    mean: of the losses
    """

    features: Features
    coefficients: np.ndarray
    mean: float

    @classmethod
    def fitted(cls, space: SearchSpace, codes: Codes, losses: Sequence[float]) -> LossPredictor:
        """Return the predictor of the losses of some archs."""
        features, y = Features(space, squares=True), np.asarray(losses, float)
        rows = features(codes)
        normal = rows.T @ rows + _RIDGE * np.eye(rows.shape[1])
        return cls(features, np.linalg.solve(normal, rows.T @ (y - y.mean())), float(y.mean()))

    def __call__(self, codes: Codes) -> np.ndarray:
        """Return what archs should lose."""
        return self.mean + self.features(codes) @ self.coefficients
