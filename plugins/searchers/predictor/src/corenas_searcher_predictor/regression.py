"""Archs as features, metrics as targets, and how well the one tells the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class Regression:
    """Predicts one metric. Targets are standardised."""

    def __init__(self, model: str, rows: np.ndarray, targets: np.ndarray, seed: int) -> None:
        self.mean, self.scale = targets.mean(), targets.std() or 1.0
        self.model = MODELS[model](seed, len(rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that could be trained longer
            self.model.fit(rows, (targets - self.mean) / self.scale)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the predictions for rows of features."""
        return np.asarray(self.model.predict(rows)).ravel() * self.scale + self.mean


def _ridge(seed: int, n: int) -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-3, 4, 29))  # the strength by leaving one out, in closed form


def _boosting(seed: int, n: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(
        n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.7, max_features=0.3, random_state=seed
    )


def _forest(seed: int, n: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(n_estimators=200, max_features=0.3, random_state=seed)


def _mlp(seed: int, n: int) -> Any:
    from sklearn.neural_network import MLPRegressor

    # ofa/nas/accuracy_predictor: 3 hidden layers of 400 with ReLU, batches of 256.
    return MLPRegressor(hidden_layer_sizes=(400, 400, 400), batch_size=min(256, n), max_iter=200, random_state=seed)


MODELS: Mapping[str, Callable[[int, int], Any]] = {
    "ridge": _ridge, "boosting": _boosting, "forest": _forest, "mlp": _mlp,
}  # fmt: skip
"""From a seed and the number of rows to a regressor of scikit-learn."""


def agreement(predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return the root mean square error and the rank correlations of predictions with what was measured.

    A correlation that is not defined, since all are equal, is left out.
    """
    from scipy.stats import kendalltau, spearmanr

    predicted, measured = np.asarray(predicted, float), np.asarray(measured, float)
    found = {"rmse": float(np.sqrt(np.mean((predicted - measured) ** 2)))}
    if len(predicted) > 1 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        found["kendall"] = float(kendalltau(predicted, measured).statistic)
        found["spearman"] = float(spearmanr(predicted, measured).statistic)
    return found


def held_out(model: str, rows: np.ndarray, targets: np.ndarray, seed: int) -> dict[str, float]:
    """Return the agreement on a fifth of the data of a predictor that was fitted to the rest."""
    order = np.random.default_rng(seed).permutation(len(rows))
    rest, fifth = np.split(order, [len(rows) - len(rows) // 5])
    if len(fifth) < 2:
        return {}
    return agreement(Regression(model, rows[rest], targets[rest], seed)(rows[fifth]), targets[fifth])
