"""Deep-compression autoencoders, such as the autoencoder of SANA."""
