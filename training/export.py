"""Exports a detector for TensorFlow Serving: `keras-fpn export`."""

from keras_fpn.runs.export import main

if __name__ == "__main__":
    main()
