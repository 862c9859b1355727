"""Define the options of a run, and read them from presets."""
