"""What happens to checkpoints once they are saved: copied, mirrored, repaired, swept."""
