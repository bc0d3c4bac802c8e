"""Family megatron."""
