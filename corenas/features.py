"""Archs as rows of features, for predictors of what they are measured as."""

from __future__ import annotations

import numpy as np

from corenas.space import Codes, SearchSpace

ONE_HOT = 8
"""Numbers with more choices than this are their place between the least and the most."""


class Features:
    """A one-hot code for each variable of an arch, all zeros where it is inactive, as in Once-for-All.

    A continuous variable, or a number with many choices, has a 1 instead, its place and, with `squares`, its square.
    """

    def __init__(self, space: SearchSpace, squares: bool = False) -> None:
        self.space, self.squares = space, squares
        self._places: dict[int, np.ndarray | None] = {}  # column -> the place of each of its numbers
        for column, variable in enumerate(space.variables):
            if variable.continuous:
                self._places[column] = None
            elif len(variable.choices) > ONE_HOT and not isinstance(variable.choices[0], str):
                choices = np.array(variable.choices, float)
                self._places[column] = (choices - choices.min()) / np.ptp(choices)
        widths = [2 + squares if at in self._places else len(v.choices) for at, v in enumerate(space.variables)]
        self._starts = np.cumsum([0, *widths])

    def __call__(self, codes: Codes) -> np.ndarray:
        """Return a row for each arch, (archs, features)."""
        active = self.space.active(codes)
        rows = np.zeros((len(codes), self._starts[-1]))
        hot = np.where([at in self._places for at in range(codes.shape[1])], 0, codes).astype(int)
        rows[np.arange(len(codes))[:, None], self._starts[:-1] + hot] = active  # of a place: that there is one
        for column, places in self._places.items():
            start = self._starts[column]
            own = codes[:, column] if places is None else places[codes[:, column].astype(int)]
            rows[:, start + 1] = own * active[:, column]
            if self.squares:
                rows[:, start + 2] = own**2 * active[:, column]
        return rows
