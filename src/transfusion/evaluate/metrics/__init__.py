"""What is measured of texts and images, each as a number with how it came about."""
