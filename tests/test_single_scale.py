import numpy as np
import pytest
from keras.ops import convert_to_numpy

from keras_fpn.single_scale import SingleScale

FEATURES = {
    f"C{level}": np.full((2, 64 >> level, 96 >> level, level), level, "float32")
    for level in range(2, 6)
}


@pytest.mark.parametrize(("level", "name"), [("C4", "P4"), ("C5", "P5")])
def test_one_map_serves_the_rpn_and_the_regions_unchanged(level, name):
    layer = SingleScale(level)
    assert layer.rpn_levels == layer.roi_levels == (name,)
    found = layer(FEATURES)
    assert list(found) == [name]
    np.testing.assert_array_equal(convert_to_numpy(found[name]), FEATURES[level])
    shapes = {level: x.shape for level, x in FEATURES.items()}
    assert layer.compute_output_shape(shapes) == {name: FEATURES[level].shape}
    assert not layer.weights


def test_it_is_c4_unless_told_otherwise_and_the_config_tells():
    assert SingleScale().level == "C4"
    layer = SingleScale("C5", name="pyramid")
    assert SingleScale.from_config(layer.get_config()).get_config() == layer.get_config()
    assert layer.get_config()["level"] == "C5"


def test_unknown_levels_are_refused():
    with pytest.raises(ValueError, match=r"`level` must be one of 'C2', .*; received 'P4'"):
        SingleScale("P4")
    with pytest.raises(ValueError, match="must have the map C4; received C2, C3"):
        SingleScale("C4")({level: FEATURES[level] for level in ("C2", "C3")})
