"""Compute the losses of the model and of the discriminator, and define their options."""
