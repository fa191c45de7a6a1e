"""The two calls of CuPy 14 that bring a GPU tensor to the host (https://docs.cupy.dev/en/stable/reference/)."""

from typing import Any

import numpy as np
import numpy.typing as npt

class ndarray: ...  # noqa: N801 (the package's name for it)

def from_dlpack(array: object) -> ndarray: ...
def asnumpy(a: ndarray) -> npt.NDArray[np.generic | Any]: ...
