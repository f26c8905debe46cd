"""From a model's name and a batch of tokens to sampled tokens; knows no queues, no text and no memory policy."""
