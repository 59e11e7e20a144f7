"""Sparse autoencoders of a text encoder's activations: what they are, how they are trained, foreign files of them."""
