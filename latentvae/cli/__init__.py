"""The command lines of the package.

The module `main` has the command `latentvae`. The module `train` runs the training scripts.
"""
