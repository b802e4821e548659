"""FedQSN in JAX: federated learning in which the server's model is the secret."""
