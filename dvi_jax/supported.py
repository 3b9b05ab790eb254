"""Says at once where the package cannot run, instead of failing later in a library."""

import sys

if sys.platform == "win32":
    raise ImportError("dvi_jax runs on Linux and, untested, on macOS; on Windows use it inside WSL")
