"""Many settings in one command: the grid, shared programs, results and their pictures.

It knows nothing of audits: what it wants of one it is given as a function.
"""
