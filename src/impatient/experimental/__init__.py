"""Written, but not proven on its hardware or its worth: nothing above imports it."""
