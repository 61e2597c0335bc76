"""The live page: one server that shows a model while it answers, and lets a hand change it (`docs/play.md`)."""
