"""What archs lose, predicted from their choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from corenas.space import Codes, SearchSpace

_ONE_HOT = 8
"""Variables of no more choices have a feature for each of them, others their place and its square."""
_RIDGE = 1.0
"""In units of archs: how many that say nothing stand beside those that say something."""


@frozen(eq=False)
class LossPredictor:
    """Ridge regression of losses on choices.

    coefficients: of each feature
    mean: of the losses
    """

    space: SearchSpace
    coefficients: np.ndarray
    mean: float

    @classmethod
    def fitted(cls, space: SearchSpace, codes: Codes, losses: Sequence[float]) -> LossPredictor:
        """Return the predictor of the losses of some archs."""
        features, y = _features(space, codes), np.asarray(losses, float)
        normal = features.T @ features + _RIDGE * np.eye(features.shape[1])
        return cls(space, np.linalg.solve(normal, features.T @ (y - y.mean())), float(y.mean()))

    def __call__(self, codes: Codes) -> np.ndarray:
        """Return what archs should lose."""
        return self.mean + _features(self.space, codes) @ self.coefficients


def _features(space: SearchSpace, codes: Codes) -> np.ndarray:
    """Return a row for each arch; a variable that is inactive has zeros."""
    active, columns = space.active(codes), []
    for variable, column, on in zip(space.variables, codes.T, active.T, strict=True):
        if variable.continuous or len(variable.choices) > _ONE_HOT:
            place = column / (1 if variable.continuous else len(variable.choices) - 1)
            own = np.stack([place, place**2], axis=1)
        else:
            own = np.eye(len(variable.choices))[column.astype(np.int64)]
        columns.append(own * on[:, None])
    return np.concatenate([np.ones((len(codes), 1)), *columns], axis=1)
