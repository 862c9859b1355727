"""Ways to compute the same results faster or in less memory. Lower layers do not import them."""
