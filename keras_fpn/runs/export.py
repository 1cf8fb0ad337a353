"""Exports a trained detector for TensorFlow Serving.

    python training/export.py --model runs/coco --output models/detector/1

The output is a new folder; its name is the version by which the server knows the model. Images are
resized as the run was evaluated unless sizes are given. examples/serving/README.md says how the
server is started and asked.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_fpn.runs.command_line import exits_on_bad_input
from keras_fpn.runs.run_folder import evaluation_edges, load_detector
from keras_fpn.serving.saved_model import export_saved_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a run, or a file of weights")
    parser.add_argument("--output", required=True, help="new folder, such as models/detector/1")
    parser.add_argument("--shorter-edge", type=int, help="images are resized to this shorter edge")
    parser.add_argument("--longest-edge", type=int, help="no edge is longer than this")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and features (default: float32)",
    )
    parser.add_argument(
        "--frozen",
        action="store_true",
        help="make the weights constants of the graph, not variables",
    )
    parser.add_argument(
        "--class-names", action="store_true", help="add the output detection_class_names"
    )
    parser.add_argument(
        "--no-warm-up", action="store_true", help="leave out the requests that warm the server up"
    )
    options = parser.parse_args(arguments)

    with exits_on_bad_input():
        if os.path.lexists(options.output):
            raise FileExistsError(f"--output is a new folder; {options.output!r} already exists.")
        model, configuration = load_detector(options.model)
        class_names = configuration.get("class_names") if options.class_names else None
        if options.class_names and class_names is None:
            raise ValueError(f"--class-names: {options.model!r} has no names of its classes.")
        edges = evaluation_edges(configuration, options.shorter_edge, options.longest_edge)
        export_saved_model(
            model,
            options.output,
            **edges,
            frozen=options.frozen,
            precision=options.precision,
            class_names=class_names,
            warm_up=not options.no_warm_up,
        )
    files = [path for path in Path(options.output).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{options.output}: {model.num_classes} classes, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
