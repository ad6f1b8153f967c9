"""Progress of a run: bars in a terminal, plain lines elsewhere."""
