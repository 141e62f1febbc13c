"""What a run can be told: the keys, named presets, and how a recipe comes from them, a file and settings."""
