"""Accuracy of a subnet with recalibrated batch norm."""
