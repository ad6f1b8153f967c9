"""What of a model becomes searchable, as a person says it in TOML or in Python."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from attrs import field, frozen
from attrs.validators import deep_iterable, ge, gt, le


@frozen
class Rules:
    """What of a model becomes searchable; the default is all that can be.

    A pattern (`layer4.*`, `*.kernel`) names variables, by the key that the space has for them or by any layer that has
    the width: `layer1.1.conv2` or `layer1.1.conv2.width`.

    ratios: widths, heads and groups as shares of the largest, which is always there
    divisor: what widths are multiples of; layers of under four times as many have smaller steps
    kernels: whether odd kernels shrink to the middle of themselves
    smallest_kernel: down to this one
    depth: whether residual blocks can be left out
    keep: of a run of blocks, the share that always runs
    fix: patterns of what stays as it is
    choices: pattern -> the choices of a variable: whole numbers, or shares of the largest below 1; the largest is
        always among them, and what is too large for one of several variables is left out there
    """

    ratios: tuple[float, ...] = field(
        default=(0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
        validator=deep_iterable([gt(0.0), le(1.0)]),
        converter=tuple,
    )
    divisor: int = field(default=8, validator=ge(1))
    kernels: bool = True
    smallest_kernel: int = field(default=3, validator=ge(1))
    depth: bool = True
    keep: float = field(default=0.0, validator=[ge(0.0), le(1.0)])
    fix: tuple[str, ...] = field(default=(), converter=tuple)
    choices: Mapping[str, tuple[float, ...]] = field(factory=dict, hash=False)

    def fixing(self, names: Iterable[str]) -> str | None:
        """Return the pattern that holds a variable of these names; None if none does."""
        return next((pattern for pattern in self.fix if _matches(pattern, names)), None)

    def chosen(self, names: Iterable[str]) -> str | None:
        """Return the pattern, the last one, that says the choices of a variable of these names; None if none does."""
        return next((pattern for pattern in reversed([*self.choices]) if _matches(pattern, names)), None)

    def widths(self, n: int) -> list[int]:
        """Return the choices of a width."""
        divisor = self.divisor
        while divisor > 1 and n < 4 * divisor:
            divisor //= 2
        found = {max(divisor, round(n * ratio / divisor) * divisor) for ratio in self.ratios}
        return sorted({width for width in found if width < n} | {n})

    def counts(self, n: int) -> list[int]:
        """Return the choices of a number of heads, of groups or of equal steps of a width."""
        return sorted({max(1, round(n * ratio)) for ratio in self.ratios} | {n})

    def kernel_sizes(self, n: int) -> list[int]:
        """Return the choices of a kernel."""
        return [*range(self.smallest_kernel, n + 1, 2)]


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
