"""The evolutionary search of Single Path One-Shot."""
