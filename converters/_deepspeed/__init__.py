"""Parts of the reader of DeepSpeed checkpoints: files, layout of each ZeRO stage, and everything that is carried."""
