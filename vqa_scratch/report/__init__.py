"""What a run shows: curves, tables, and pages of samples."""
