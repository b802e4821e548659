"""All parties of a federation in one process: composed, scheduled, measured and run."""
