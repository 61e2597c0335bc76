"""What can be done with a finished run, one command a file: ask, evaluate, export; and convert for weight files."""
