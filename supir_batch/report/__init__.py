"""The page one opens after a run: before and after, settings, failures."""
