"""What several tests of loading start from."""

from tests.train.tied import source

__all__ = ["source"]
