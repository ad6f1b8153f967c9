"""Single Path One-Shot: train a supernet one uniform path at a time."""
