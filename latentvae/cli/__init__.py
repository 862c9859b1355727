"""The command lines: `main` is `latentvae ...`, `train` is behind the training scripts."""
