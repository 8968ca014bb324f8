"""Train robustly: the classifier, its callbacks, and runs on disk."""
