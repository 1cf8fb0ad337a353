"""Evaluates a detector with COCO's metrics: `keras-fpn evaluate`."""

from keras_fpn.runs.evaluate import main

if __name__ == "__main__":
    main()
