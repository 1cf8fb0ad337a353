"""Detects objects in image files: `keras-fpn predict`."""

from keras_fpn.runs.predict import main

if __name__ == "__main__":
    main()
