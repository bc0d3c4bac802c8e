"""Optimizers that number their parameters, as torch's do: which name each number has."""
