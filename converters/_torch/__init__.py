"""What torch.save writes, alone or in the folders of Lightning, Accelerate and Trainer."""
