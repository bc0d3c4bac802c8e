"""Programs of the Megatron world, held against Megatron-Core's own modules."""
