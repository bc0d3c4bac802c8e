"""Coverage-guided fuzzing of every reader: ``python -m tests.fuzz``, and its corpora as ordinary tests."""
