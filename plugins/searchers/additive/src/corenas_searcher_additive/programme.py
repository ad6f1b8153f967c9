"""The archs of a space as the points of a mixed-integer programme, and linear functions of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from corenas.space import Codes, SearchSpace
from corenas.variables import Variable

MOST_CHOICES = 33
"""Of numbers with more choices so many are considered, evenly between the least and the most."""
_NODES = 1000
"""After so many nodes the best solution so far counts; a limit in seconds would not give the same archs twice."""


class Programme:
    """One binary unknown for each choice of each variable; of an active variable one is 1, of an inactive one none.

    options: the codes that are considered of each variable; starts: the column of the first of each
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.options = [_options(variable) for variable in space.variables]
        self.starts = np.cumsum([0, *map(len, self.options)])
        self.size = int(self.starts[-1])
        self._rows: list[tuple[dict[int, float], float, float]] = [*self._structure()]

    def features(self, codes: Codes) -> np.ndarray:
        """Return a row of 0 and 1 for each arch; of codes between two that are considered the nearer one is 1."""
        active = self.space.active(codes)
        rows = np.zeros((len(codes), self.size))
        for at, options in enumerate(self.options):
            nearest = np.abs(codes[:, at, None] - options).argmin(axis=1)
            rows[np.arange(len(codes)), self.starts[at] + nearest] = active[:, at]
        return rows

    def solve(
        self, gains: np.ndarray, limits: Sequence[tuple[np.ndarray, float, float]], without: Sequence[np.ndarray] = ()
    ) -> Codes | None:
        """Return the codes of the arch of the largest gain, one row; None if there is none.

        limits: coefficients with the least and the most that they may come to
        without: features of archs that are not wanted
        """
        rows = [*self._rows]
        for coefficients, low, high in limits:
            rows.append((dict(enumerate(coefficients.tolist())), low, high))
        for features in without:
            chosen = np.flatnonzero(features).tolist()
            rows.append((dict.fromkeys(chosen, 1.0), -np.inf, len(chosen) - 1))
        entries = [(row, column, value) for row, (own, _, _) in enumerate(rows) for column, value in own.items()]
        at, columns, values = (np.array(part) for part in zip(*entries, strict=True))
        matrix = coo_array((values, (at, columns)), shape=(len(rows), self.size)).tocsr()
        lows, highs = np.array([low for _, low, _ in rows]), np.array([high for _, _, high in rows])
        found = milp(
            -gains,
            integrality=np.ones(self.size),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, lows, highs),
            options={"node_limit": _NODES, "mip_rel_gap": 1e-6},
        )
        return None if found.x is None else self._decoded(found.x)

    def _decoded(self, solution: np.ndarray) -> Codes:
        codes = self.space.encode([self.space.default()])
        for at, options in enumerate(self.options):
            part = solution[self.starts[at] : self.starts[at + 1]]
            if part.max() > 0.5:
                codes[0, at] = options[part.argmax()]
        return self.space.canonical(codes)

    def _structure(self) -> list[tuple[dict[int, float], float, float]]:
        """Return the rows that make a point an arch: coefficients by column, the least and the most of their sum."""
        rows: list[tuple[dict[int, float], float, float]] = []
        columns = {key: at for at, key in enumerate(self.space.keys)}
        for at, variable in enumerate(self.space.variables):
            own = dict.fromkeys(range(self.starts[at], self.starts[at + 1]), 1.0)
            opened = []
            for condition in variable.when:
                parent = columns[condition.key]
                allowed = {self.space.variables[parent].code_of(choice) for choice in condition.choices}
                places = [self.starts[parent] + i for i, code in enumerate(self.options[parent]) if code in allowed]
                opened.append(dict.fromkeys(places, -1.0))
            if len(opened) == 1:  # active just where its parent's choice is among these
                rows.append(({**own, **opened[0]}, 0, 0))
                continue
            rows += [({**own, **each}, -np.inf, 0) for each in opened]  # nowhere else
            together: dict[int, float] = {**own}
            for each in opened:
                for column, value in each.items():
                    together[column] = together.get(column, 0) + value
            rows.append((together, 1 - len(opened), 1 if not opened else np.inf))  # and wherever all of them hold
        return rows


def _options(variable: Variable) -> np.ndarray:
    if variable.continuous:
        return np.linspace(0, 1, MOST_CHOICES)
    n = len(variable.choices)
    if n > MOST_CHOICES and not isinstance(variable.choices[0], str):
        return np.unique(np.linspace(0, n - 1, MOST_CHOICES).round().astype(int))
    return np.arange(n)
