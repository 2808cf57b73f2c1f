"""The base model: the only layer that knows the insides of transformers."""
