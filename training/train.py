"""Trains a detector: `keras-fpn train`."""

from keras_fpn.runs.train import main

if __name__ == "__main__":
    main()
