"""Checkpoints of torch.distributed.checkpoint (DCP): their metadata, items and names."""
