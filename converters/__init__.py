"""Readers and writers of checkpoint families, one module each, installed as ``ucp.converters``.

A module's ``CONVERTER`` is named in the entry-point group ``ucp.converters``; other distributions add families the same
way. Converters import ``ucp``; ``ucp`` finds them by entry point and never imports them by name.
"""
