"""Thin adapters that put ucp where training frameworks already save and load."""
