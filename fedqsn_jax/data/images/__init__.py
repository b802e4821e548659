"""Image data sets: scikit-learn's digits, and those that TFDS has prepared."""
