"""Base classes of the stages: layers whose configs are the arguments of their constructors."""

import inspect

import keras


class Stage(keras.layers.Layer):
    """A layer that keeps each argument of its constructor in an attribute of the same name.

    Its config is read from those attributes, so that an argument is named nowhere else.
    """

    def get_config(self) -> dict:
        arguments = (
            name
            for cls in type(self).__mro__
            if issubclass(cls, Stage) and "__init__" in vars(cls)
            for name, parameter in inspect.signature(cls).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        )
        return super().get_config() | {name: getattr(self, name) for name in arguments}


class Float32Stage(Stage):
    """A stage that computes in float32 whatever the precision policy: pixels, boxes, losses."""

    def __init__(self, **kwargs):
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
