"""Which whole numbers a range has, and how likely each of them is drawn, by the distributions of pycls's sweeps.

The rules are those of pycls (Dollár et al. 2021, arXiv:2103.06877); here they give exact chances of a list of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Chances = Mapping[int, float]
"""Number -> its chance; they sum to 1."""


def chances(distribution: str, low: int, high: int, step: int) -> Chances:
    """Return the numbers of a range, in order, each with its chance.

    Raises ValueError for a range that the distribution cannot have: its bounds are no multiples of the step, or no
    powers of 2, or reach 0.
    """
    return DISTRIBUTIONS[distribution](low, high, step)


def _log(low: int, high: int, step: int) -> Chances:
    """The logarithm is uniform, numbers round up to a multiple of the step."""
    _refuse(low < 1, f"its low has to be above 0, found {low}")
    numbers = _multiples(low, high, step)
    below = low - min(step, low / 2)
    whole = math.log(high / below)
    return {number: math.log(number / max(below, number - step)) / whole for number in numbers}


def _power2(low: int, high: int, step: int) -> Chances:
    """Every power of 2 is as likely."""
    _refuse(not (_is_power2(low) and _is_power2(high)), f"powers of 2 go from one to another, found {low} to {high}")
    numbers = [2**i for i in range(low.bit_length() - 1, high.bit_length())]
    return dict.fromkeys(numbers, 1 / len(numbers))


def _power2_or_log(low: int, high: int, step: int) -> Chances:
    """A power of 2; one that reaches the step is drawn again, its logarithm uniform over the multiples of the step."""
    _refuse(not _is_power2(step), f"its step has to be a power of 2, found {step}")
    powers = _power2(low, high, 1)
    small = {number: chance for number, chance in powers.items() if number < step}
    left = 1 - sum(small.values())
    if left <= 0:
        return small
    return small | {n: left * chance for n, chance in _log(max(low, step), high, min(high, step)).items()}


def _normal(low: int, high: int, step: int) -> Chances:
    """A normal of the middle, the bounds three deviations away, drawn until it is inside, rounded to the step."""
    return _bell(low, high, step, float)


def _log_normal(low: int, high: int, step: int) -> Chances:
    """The same of the logarithm."""
    _refuse(low < 1, f"its low has to be above 0, found {low}")
    return _bell(low, high, step, math.log)


def _bell(low: int, high: int, step: int, scale: Callable[[float], float]) -> Chances:
    numbers = _multiples(low, high, step)
    if low == high:
        return {low: 1.0}
    first, last = scale(low), scale(high)
    middle, deviation = (first + last) / 2, (last - first) / 6

    def share(number: float) -> float:
        return math.erf((scale(min(max(number, low), high)) - middle) / deviation / math.sqrt(2))

    whole = share(high) - share(low)
    return {number: (share(number + step / 2) - share(number - step / 2)) / whole for number in numbers}


def _multiples(low: int, high: int, step: int) -> Sequence[int]:
    _refuse(step < 1 or low % step or high % step or low > high, f"{low} to {high} are no multiples of the step {step}")
    return range(low, high + 1, step)


def _is_power2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _refuse(wrong: object, text: str) -> None:
    if wrong:
        raise ValueError(text)


DISTRIBUTIONS: Mapping[str, Callable[[int, int, int], Chances]] = {
    "log": _log,
    "power2": _power2,
    "power2_or_log": _power2_or_log,
    "normal": _normal,
    "log_normal": _log_normal,
}
"""The distributions of whole numbers beside the uniform one, by the names that TOML has for them."""
