"""How Megatron-Core and Megatron-LM lay out what they save."""
