"""A problem is data, a model and a task that fit each other, as a configuration names them."""
