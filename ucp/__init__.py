"""Universal checkpoints: distributed-training state, free from the layout that wrote it."""

__all__: list[str] = []
