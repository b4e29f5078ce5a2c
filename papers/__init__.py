"""The papers whose tables this library reproduces.

Each has a folder. Run them from the repository's root.
"""
