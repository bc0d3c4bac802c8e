"""DeepSpeed's own checkpoints written: what lies in which rank's file, as tasks."""
