"""Image classifiers: MLP, CNNs, ResNet-18."""
