"""Kernels: attention over pages, one function a backend, chosen when an engine is built.

``kernel`` says what one is; ``choose`` takes the first of a list that can serve the model's layers
and passes ``self_test`` on the device.
"""

from __future__ import annotations

from ds_cp.attention.kernels.choose import choose_kernel
from ds_cp.attention.kernels.kernel import Call, Merge, PagedKernel

__all__ = ["Call", "Merge", "PagedKernel", "choose_kernel"]
