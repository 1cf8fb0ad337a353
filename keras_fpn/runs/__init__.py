"""Training runs and the commands of `keras-fpn`."""
