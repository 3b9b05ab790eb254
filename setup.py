"""What pyproject.toml cannot say: a wheel keeps the packages around the library inside it (`dvi_jax/tools.py`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOOLS = ("conversion", "experiments", "kangaroo_ref")
SHIPPED = ("*.py", "configs/*.yaml", "results/drafters/**/*")  # of each of them


class BuildWithTools(build_py):
    """`build_py` that also copies the tools into the package; an editable install finds them in the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "dvi_jax" / "_tools"
        shutil.rmtree(target, ignore_errors=True)
        for source in self._sources():
            (target / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / source)

    @staticmethod
    def _sources() -> list[Path]:
        found = {path for tool in TOOLS for pattern in SHIPPED for path in Path(tool).glob(pattern)}
        found |= {path for tool in TOOLS for path in Path(tool).glob("*/*.py")}
        return sorted(path for path in found if path.is_file())


setup(cmdclass={"build_py": BuildWithTools})
