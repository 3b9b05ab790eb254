"""A pytest plugin (`-p experiments.no_shrinking`): hypothesis reports the first failure that it finds, as it is."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("no shrinking", phases=(Phase.explicit, Phase.generate), database=None)
settings.load_profile("no shrinking")
