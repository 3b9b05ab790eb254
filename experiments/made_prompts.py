"""Prompts that no log holds enough of: functions to complete, and word problems. To generate replies for.

    python -m experiments.made_prompts --checkpoint CKPT --functions 6000 --problems 3000 --out made.npz

Functions are those of the packages in this environment (their signature and docstring), of files taken at random until
there are enough; a word problem is a template with other names and numbers each time. Neither is taken from a
benchmark. The same seed in the same environment gives the same prompts.
"""

from __future__ import annotations

import ast
import itertools
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dvi_jax.data.conversations import Message
from dvi_jax.data.tokenizer import Tokenizer
from dvi_jax.errors import ArgumentParser, run_cli
from dvi_jax.importing.cache import open_checkpoint
from experiments.prompts import Candidate, choose, pick, write_prompts

FUNCTION_REQUESTS = (
    "Complete the following Python function.\n\n```python\n{code}\n```",
    "{code}\n\nImplement this function.",
    "Please write the body of this function in Python:\n\n{code}",
    "Write a Python function `{name}` for this specification: {purpose}",
    "How would I implement this in Python, without libraries? {purpose}",
    "Write {language} code for the following, with a short example of its use. {purpose}",
)
LANGUAGES = ("Python", "JavaScript", "Java", "C++", "Go", "TypeScript", "Rust", "C#")
NAMES = ("Maya", "Tom", "Ahmed", "Lucia", "Ken", "Priya", "Olga", "Samuel", "Nora", "Diego", "Ines", "Peter")
THINGS = ("apples", "books", "pencils", "stickers", "eggs", "coins", "cups", "tickets", "stamps", "bricks", "shirts")
PROBLEMS = (
    "{a} buys {n} {thing} for ${p} each and {m} more for ${q} each. How much does {a} pay in all?",
    "{a} has {n} {thing}. {b} has {k} times as many. How many {thing} do they have together?",
    "A box holds {k} {thing}. How many boxes does {a} need for {n} {thing}, and how many are in the last box?",
    "{a} reads {k} pages on the first day and {m} more every day than the day before. How many pages in {d} days?",
    "A train covers {n} km in {d} hours. At the same speed, how long does it take for {big} km?",
    "{a} earns ${p} an hour and works {k} hours a day, {d} days a week. After spending ${n}, what is left of a week?",
    "A shop sells {thing} at ${q} each. It lowers the price by {percent}%. What do {m} {thing} cost now?",
    "{a} is {k} years older than {b}. In {d} years their ages add up to {big}. How old is {b} now?",
    "Half of the {n} {thing} are red and a quarter of the rest are blue. How many are of neither color?",
    "{a} saves ${p} a week. {b} has ${n} and spends ${q} a week. After how many weeks does {a} have more than {b}?",
    "A tank holds {big} liters. It loses {k} liters every hour and gains {d}. When is it empty?",
    "{a}, {b} and {c} share {big} {thing}. {b} gets twice as many as {a}, {c} gets {k} more than {b}. How many each?",
    "The sides of a rectangle are {k} and {m}. What are its area, its perimeter and the length of its diagonal?",
    "What is the probability of drawing {d} {thing} of one kind in a row from {k} of that kind and {m} others?",
    "Solve for x: {k}x + {m} = {n}. Show every step.",
    "{a} bakes {n} cookies, eats {d}, gives {percent}% of the rest to {b} and sells what is left for ${q} each. How"
    " much money does {a} make?",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the prompts, leave out those that are too long or there already, and write the file."""
    parser = ArgumentParser(prog="python -m experiments.made_prompts", description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--functions", type=int, default=6000, help="requests for code")
    parser.add_argument("--problems", type=int, default=3000, help="word problems")
    parser.add_argument("--max-prompt-tokens", type=int, default=380)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(options.checkpoint))
    for_functions, for_problems = np.random.default_rng(options.seed).spawn(2)
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    longest = options.max_prompt_tokens
    functions = choose(function_requests(folders, for_functions), tokenizer, longest, {"function": options.functions})
    problems = word_problems(2 * options.problems, for_problems)
    chosen = itertools.chain(functions, choose(problems, tokenizer, longest, {"problem": options.problems}))
    write_prompts(options.out, chosen)
    return 0


def function_requests(folders: Sequence[Path], rng: np.random.Generator) -> Iterator[Candidate]:
    """A request for every documented function of the modules below `folders`, module by module in random order.

    A module is read when its first function is asked for.
    """
    paths = sorted({path for folder in folders for path in folder.rglob("*.py")})
    for i in rng.permutation(len(paths)):
        for function in functions_of(paths[i]):
            text = pick(FUNCTION_REQUESTS, rng).format(**function, language=pick(LANGUAGES, rng))
            yield Candidate("function", (Message("user", text),))


def functions_of(path: Path) -> Iterator[dict[str, str]]:
    """`code` (signature and docstring), `name` and `purpose` of the functions of a file that say what they do."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # a template, or not in this Python
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith(("_", "test")):
            continue
        text = ast.get_docstring(node)
        if not text or not 60 < len(text) < 900 or len(node.body) < 3:
            continue
        body = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        code = f'def {node.name}({ast.unparse(node.args)}):\n    """{body.lstrip()}\n    """'
        yield {"code": code, "name": node.name, "purpose": text.split("\n\n")[0]}


def word_problems(count: int, rng: np.random.Generator) -> list[Candidate]:
    """`count` problems, some of them alike."""

    def problem() -> str:
        a, b, c = (NAMES[i] for i in rng.permutation(len(NAMES))[:3])
        ranges = {"n": (24, 400), "m": (2, 30), "k": (3, 25), "d": (2, 9), "p": (5, 60), "q": (2, 20), "big": (60, 900)}
        numbers = {name: int(rng.integers(*bounds)) for name, bounds in ranges.items()}
        percent = 5 * int(rng.integers(1, 17))
        return pick(PROBLEMS, rng).format(a=a, b=b, c=c, thing=pick(THINGS, rng), percent=percent, **numbers)

    return [Candidate("problem", (Message("user", problem()),)) for _ in range(count)]


if __name__ == "__main__":
    sys.exit(run_cli(main))
