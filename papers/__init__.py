"""The papers whose tables this library reproduces, one folder each; run from the repository's root."""
