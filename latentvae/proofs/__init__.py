"""Test a training, and how well a generator learns from a model's codes.

`preflight` tests the first updates of a training, and `verify_resume` tests its resume after kills.
`generator_proof` measures how well a generator learns from latents or tokens.
"""
