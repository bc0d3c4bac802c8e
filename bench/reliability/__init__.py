"""What is promised of checkpoints, tried: every figure of docs/reliability.md comes from here."""
