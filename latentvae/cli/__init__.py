"""Every command line: `main` (`latentvae ...`), `train` (the training scripts), and their flags."""
