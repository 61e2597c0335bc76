"""What can be done with a finished run, a command a file: ask, evaluate, study, export; convert is for weight files.

A module here is read for its --help alone, which must not wait for torch: what computes is imported when it runs.
"""
