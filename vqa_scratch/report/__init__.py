"""Reports of a run: curves, tables, and pages of samples."""
