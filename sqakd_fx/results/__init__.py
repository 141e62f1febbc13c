"""The result folder: the trained student, the exported file, the report."""
