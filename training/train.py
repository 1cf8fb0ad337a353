"""`keras-fpn train` from a checkout."""

import sys

from keras_fpn.runs.command import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
