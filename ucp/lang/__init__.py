"""The conversion language: text and JSON to a syntax tree, checked, bound to real shards, and explained. No torch, no I/O."""
