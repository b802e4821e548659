"""Many settings in one command: the grid, shared programs, results and their pictures."""
