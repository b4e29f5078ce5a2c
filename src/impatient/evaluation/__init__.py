"""How good it is: recordings, metrics, evaluation and reports."""
