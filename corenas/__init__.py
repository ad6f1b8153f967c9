"""A plugin-based framework for one-shot neural architecture search."""

__version__ = "0.1.0"
CONTRACT = 2
"""The version of the contracts in `corenas.hookspecs` and `corenas.contracts` that plugins are written for."""
