"""Image classifiers: MLP, CNNs, ResNet-18. Each file is a linen module."""
