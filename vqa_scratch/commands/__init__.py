"""What can be done with a finished run, a command a file: ask, evaluate, study, export; convert is for weight files."""
