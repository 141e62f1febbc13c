"""The commands, by subject; torch is imported when one runs."""
