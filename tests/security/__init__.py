"""Checkpoints that were made to harm whoever reads them, as whole folders through the public entry points."""
