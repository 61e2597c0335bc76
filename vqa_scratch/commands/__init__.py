"""The commands of `python -m vqa_scratch`, one a file.

A command imports torch only when it runs, so that its --help is immediate.
"""
