"""What a run tells its user: the terminal, files of metrics, TensorBoard, pictures."""
