"""Image classification: MNIST-5k, digits, image folders, torchvision's data sets."""
