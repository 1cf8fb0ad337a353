"""`keras-fpn evaluate` from a checkout."""

import sys

from keras_fpn.runs.command import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
