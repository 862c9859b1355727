"""Named loss terms, their weights, and the discriminator."""
