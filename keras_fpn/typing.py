"""Types in the signatures of this package."""

from typing import Any, TypeAlias

# A tensor of the backend, an array, or a KerasTensor.
Tensor: TypeAlias = Any
