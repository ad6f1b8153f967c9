"""Random search over the archs that obey the constraints."""
