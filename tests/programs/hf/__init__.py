"""Tiny models of the transformers library, the judges of the programs for its families."""
