"""How the archs of a training step are drawn: options of all mutators of this distribution."""

from __future__ import annotations

from corenas.hookspecs import hookimpl
from corenas_mutator_sampling.attentive import Attentive
from corenas_mutator_sampling.fair import Fair
from corenas_mutator_sampling.flops_uniform import FlopsUniform
from corenas_mutator_sampling.plain import Max, Sandwich, Uniform
from corenas_mutator_sampling.weighted import Weighted

__all__ = ["Attentive", "Fair", "FlopsUniform", "Max", "Sandwich", "Uniform", "Weighted"]


@hookimpl
def corenas_mutators() -> dict[str, type]:
    """Offer "max", "uniform", "weighted", "flops_uniform", "fair", "sandwich" and "attentive"."""
    return {
        "max": Max,
        "uniform": Uniform,
        "weighted": Weighted,
        "flops_uniform": FlopsUniform,
        "fair": Fair,
        "sandwich": Sandwich,
        "attentive": Attentive,
    }
