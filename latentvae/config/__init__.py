"""The options of a run, and presets."""
