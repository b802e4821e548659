"""A problem is data, a model and a task that fit each other, as a configuration names them.

It knows nothing of masks, clients' training or rounds; the server's own training before them is
here.
"""
