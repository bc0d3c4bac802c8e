"""What touches a live job: its modules, optimizers and sharded tensors."""
