"""Variational autoencoders with latent vectors: dense (Kingma and Welling) and convolutional."""
