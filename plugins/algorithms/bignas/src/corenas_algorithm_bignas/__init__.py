"""BigNAS: the sandwich rule with in-place distillation."""
