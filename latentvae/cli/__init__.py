"""The command lines. `main` is the command `latentvae`, and the training scripts call `train`."""
