"""The test suite; it mirrors the tree. ``python -m tests`` runs every level that this machine can run."""
