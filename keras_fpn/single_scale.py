"""A single feature map in place of the pyramid: baselines (a) and (b) of FPN, Tables 1 to 3."""

from collections.abc import Mapping

import keras

from keras_fpn.stage import Stage
from keras_fpn.validation import check_choice


@keras.saving.register_keras_serializable("keras_fpn")
class SingleScale(Stage):
    """Hands one bottom-up map to the RPN and to the regions, as in Faster R-CNN on a ResNet.

    It stands where `FeaturePyramid` does, and has no weights. All anchors are assigned to the one
    map, and all regions are pooled from it.

    Args:
        level: name of the map: "C4", the default and baseline (a), or "C5", baseline (b); "C2" and
            "C3" work too.

    Attributes:
        rpn_levels: name of the level that the RPN predicts on, such as `("P4",)`.
        roi_levels: the same: name of the level that regions are pooled from.

    Raises:
        ValueError: if there is no such level.
    """

    def __init__(self, level: str = "C4", **kwargs):
        super().__init__(**kwargs)
        self.level = check_choice("level", level, ("C2", "C3", "C4", "C5"))
        self.rpn_levels = self.roi_levels = (f"P{level[1:]}",)

    def build(self, input_shapes):
        if self.level not in input_shapes:
            raise ValueError(
                f"The backbone must have the map {self.level}; received {', '.join(input_shapes)}."
            )

    def call(self, features: Mapping, training: bool | None = None) -> dict:
        """Returns the map under the name of a pyramid level.

        Args:
            features: `{"C2": [B, H/4, W/4, C], ...}`, the map among them.
            training: not used.

        Returns:
            `{"P4": [B, H/16, W/16, C]}`, or the level of another map.
        """
        return {self.roi_levels[0]: features[self.level]}

    def compute_output_shape(self, input_shapes) -> dict:
        return {self.roi_levels[0]: tuple(input_shapes[self.level])}
