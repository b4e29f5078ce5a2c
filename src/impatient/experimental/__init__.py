"""Written, but not proven on its hardware, or not worth its price yet."""
