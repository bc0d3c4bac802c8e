"""Training state beyond tensors: what each kind of object saves, and how it goes on when the world changed."""
