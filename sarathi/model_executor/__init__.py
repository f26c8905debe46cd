"""From a model's name and a batch of tokens to sampled tokens."""
