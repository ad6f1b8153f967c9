"""How the archs of a training step are drawn: max, uniform, sandwich."""
