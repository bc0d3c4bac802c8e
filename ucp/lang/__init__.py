"""The conversion language: text and JSON to a syntax tree, checked, bound to real shards, and explained. No torch."""

from ucp.lang.ast import Program
from ucp.lang.error import program_error
from ucp.lang.format import format_program
from ucp.lang.json import to_json
from ucp.lang.json_read import from_json
from ucp.lang.load import load_program, shipped
from ucp.lang.parser import parse

__all__ = ["Program", "format_program", "from_json", "load_program", "parse", "program_error", "shipped", "to_json"]
