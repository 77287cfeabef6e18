"""Tests of kernels in Triton's interpreter have a process of their own: it must be on before Triton is imported."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
