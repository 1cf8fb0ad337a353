"""`keras-fpn paper` from a checkout."""

import sys

if __name__ == "__main__":
    sys.argv[0] = "keras-fpn"  # The package then imports Keras only when it is needed.
    from keras_fpn.runs.command import main

    main(["paper", *sys.argv[1:]])
