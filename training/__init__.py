"""Recipes, data pipelines and programs that turn `keras_fpn` into trained detectors."""
