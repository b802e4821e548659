"""Data sets, and how their rows are divided among the server and the clients."""
