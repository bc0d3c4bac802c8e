"""Files that hold tensors, read and written without the framework that made them: torch.save and safetensors.

Nothing here imports torch or runs anything that a file asks for.
"""
