"""Small programs in words and in Python: "add 3 to every number, then keep the even ones".

A program is one to three operations on a list of numbers or of words. Its *shape* is the sequence
of operations without their constants; training and test never share a shape of two or more
operations, so a held-out program cannot be copied, only put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

SPLITS = ("train", "test")
TEST_SHARE = 0.2  # of the shapes
WORDS = tuple(
    "apple stone river cloud garden window letter silver orange table music winter forest bridge "
    "candle mirror paper bottle yellow button sugar pencil island rabbit tiger planet rocket "
    "market lemon basket copper velvet hammer saddle needle ladder".split()
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One line of a function; `{k}` stands for its constant."""

    name: str
    phrases: tuple[str, ...]  # imperatives that say the same
    code: str  # an expression of `numbers` or `words`
    apply: Callable[[list, Any], Any]  # (values, constant) → what the expression gives
    constants: tuple = ()  # to choose from; empty where there is none
    ends: bool = False  # whether the result is no list any more


_K = tuple(range(2, 10))
_LETTERS = tuple("aeilnort")
NUMBERS = (
    Operation("add", ("add {k} to every number", "increase every number by {k}"),
              "[n + {k} for n in numbers]", lambda v, k: [n + k for n in v], _K),
    Operation("subtract", ("subtract {k} from every number", "decrease every number by {k}"),
              "[n - {k} for n in numbers]", lambda v, k: [n - k for n in v], _K),
    Operation("multiply", ("multiply every number by {k}", "scale every number by {k}"),
              "[n * {k} for n in numbers]", lambda v, k: [n * k for n in v], _K),
    Operation("remainder", ("take every number modulo {k}", "take the remainder by {k}"),
              "[n % {k} for n in numbers]", lambda v, k: [n % k for n in v], _K),
    Operation("square", ("square every number", "raise every number to the power of two"),
              "[n ** 2 for n in numbers]", lambda v, k: [n**2 for n in v]),
    Operation("negate", ("negate every number", "change the sign of every number"),
              "[-n for n in numbers]", lambda v, k: [-n for n in v]),
    Operation("absolute", ("take the absolute value of every number", "drop every sign"),
              "[abs(n) for n in numbers]", lambda v, k: [abs(n) for n in v]),
    Operation("even", ("keep the even numbers", "remove the odd numbers"),
              "[n for n in numbers if n % 2 == 0]", lambda v, k: [n for n in v if n % 2 == 0]),
    Operation("odd", ("keep the odd numbers", "remove the even numbers"),
              "[n for n in numbers if n % 2 == 1]", lambda v, k: [n for n in v if n % 2 == 1]),
    Operation("above", ("keep the numbers above {k}", "keep what is greater than {k}"),
              "[n for n in numbers if n > {k}]", lambda v, k: [n for n in v if n > k], _K),
    Operation("below", ("keep the numbers below {k}", "keep what is less than {k}"),
              "[n for n in numbers if n < {k}]", lambda v, k: [n for n in v if n < k], _K),
    Operation("multiples", ("keep the multiples of {k}", "keep what {k} divides"),
              "[n for n in numbers if n % {k} == 0]", lambda v, k: [n for n in v if n % k == 0],
              tuple(range(3, 10))),
    Operation("ascending", ("sort the numbers", "put the numbers in ascending order"),
              "sorted(numbers)", lambda v, k: sorted(v)),
    Operation("descending", ("put the largest first", "sort the numbers in descending order"),
              "sorted(numbers, reverse=True)", lambda v, k: sorted(v, reverse=True)),
    Operation("backwards", ("reverse the list", "turn the list around"),
              "numbers[::-1]", lambda v, k: v[::-1]),
    Operation("first", ("keep the first {k}", "take the first {k} of them"),
              "numbers[:{k}]", lambda v, k: v[:k], (2, 3, 4)),
    Operation("sum", ("return the sum", "add everything up"),
              "sum(numbers)", lambda v, k: sum(v), ends=True),
    Operation("largest", ("return the largest", "find the maximum"),
              "max(numbers, default=0)", lambda v, k: max(v, default=0), ends=True),
    Operation("smallest", ("return the smallest", "find the minimum"),
              "min(numbers, default=0)", lambda v, k: min(v, default=0), ends=True),
    Operation("count", ("count them", "return how many are left"),
              "len(numbers)", lambda v, k: len(v), ends=True),
)  # fmt: skip
TEXTS = (
    Operation("upper", ("write every word in capitals", "make every word upper case"),
              "[w.upper() for w in words]", lambda v, k: [w.upper() for w in v]),
    Operation("title", ("capitalize every word", "start every word with a capital"),
              "[w.title() for w in words]", lambda v, k: [w.title() for w in v]),
    Operation("mirror", ("spell every word backwards", "reverse the letters of every word"),
              "[w[::-1] for w in words]", lambda v, k: [w[::-1] for w in v]),
    Operation("cut", ("cut every word to {k} letters", "shorten every word to {k} letters"),
              "[w[:{k}] for w in words]", lambda v, k: [w[:k] for w in v], (2, 3, 4)),
    Operation("longer", ("keep words longer than {k}", "keep words of more than {k} letters"),
              "[w for w in words if len(w) > {k}]", lambda v, k: [w for w in v if len(w) > k],
              (3, 4, 5)),
    Operation("shorter", ("keep words shorter than {k}", "keep words of fewer than {k} letters"),
              "[w for w in words if len(w) < {k}]", lambda v, k: [w for w in v if len(w) < k],
              (5, 6, 7)),
    Operation("containing", ("keep words with the letter {k}", "keep words that contain {k}"),
              "[w for w in words if '{k}' in w]", lambda v, k: [w for w in v if k in w], _LETTERS),
    Operation("alphabetical", ("sort the words", "put the words in alphabetical order"),
              "sorted(words)", lambda v, k: sorted(v)),
    Operation("by_length", ("sort the words by length", "put the shortest word first"),
              "sorted(words, key=len)", lambda v, k: sorted(v, key=len)),
    Operation("backwards", ("reverse the list", "turn the list around"),
              "words[::-1]", lambda v, k: v[::-1]),
    Operation("first", ("keep the first {k}", "take the first {k} of them"),
              "words[:{k}]", lambda v, k: v[:k], (2, 3, 4)),
    Operation("join", ("join them with spaces", "make one text with spaces"),
              "' '.join(words)", lambda v, k: " ".join(v), ends=True),
    Operation("commas", ("join them with commas", "put commas between them"),
              "','.join(words)", lambda v, k: ",".join(v), ends=True),
    Operation("count", ("count them", "return how many are left"),
              "len(words)", lambda v, k: len(v), ends=True),
)  # fmt: skip
SORTS = {"numbers": NUMBERS, "words": TEXTS}  # the argument's name → what can be done with it


@dataclass(frozen=True)
class Program:
    """Operations with their constants."""

    argument: str  # "numbers" or "words"
    steps: tuple[tuple[Operation, Any], ...]  # (operation, its constant or None)

    @property
    def shape(self) -> tuple[str, ...]:
        """What tells training from test: the argument and the names of the operations."""
        return (self.argument, *(operation.name for operation, _ in self.steps))

    def words(self, generator: np.random.Generator) -> str:
        """One sentence without capital and full stop, phrases chosen at random."""
        parts = [
            operation.phrases[generator.integers(len(operation.phrases))].format(k=constant)
            for operation, constant in self.steps
        ]
        return ", then ".join(parts)

    def body(self) -> str:
        """The indented lines of the function, the last one a `return`."""
        codes = [operation.code.format(k=constant) for operation, constant in self.steps]
        lines = [f"    {self.argument} = {code}" for code in codes[:-1]]
        return "\n".join([*lines, f"    return {codes[-1]}"])

    def source(self, name: str = "solve") -> str:
        """The function as Python source without a final newline."""
        return f"def {name}({self.argument}):\n{self.body()}"

    def run(self, values: list) -> Any:
        """What the function returns, computed without its source."""
        for operation, constant in self.steps:
            values = operation.apply(values, constant)
        return values


def split_of(shape: tuple[str, ...]) -> str:
    """The split that a shape belongs to; a single operation is always for training."""
    if len(shape) == 2:
        return "train"
    return "test" if _hash(" ".join(shape)) < TEST_SHARE else "train"


def make_program(split: str, generator: np.random.Generator) -> Program:
    """Draw a program: one operation (training only), two, or three.

    Args:
        split: "train" or "test".
        generator: source of all randomness.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    while True:
        argument = "numbers" if generator.random() < 0.6 else "words"
        length = generator.choice((1, 2, 3), p=(0.15, 0.6, 0.25))
        steps = tuple(_draw(argument, i == length - 1, generator) for i in range(length))
        names = [operation.name for operation, _ in steps]
        program = Program(argument, steps)
        if len(set(names)) == len(names) and split_of(program.shape) == split:
            return program


def make_values(argument: str, generator: np.random.Generator) -> list:
    """A list to call a function with: four to seven numbers from -9 to 20, or words."""
    count = int(generator.integers(4, 8))
    if argument == "words":
        return [WORDS[i] for i in generator.choice(len(WORDS), count, replace=False)]
    return generator.integers(-9, 21, count).tolist()


def _draw(argument: str, last: bool, generator: np.random.Generator) -> tuple[Operation, Any]:
    choices = [operation for operation in SORTS[argument] if last or not operation.ends]
    operation = choices[generator.integers(len(choices))]
    constants = operation.constants
    return operation, constants[generator.integers(len(constants))] if constants else None


def _hash(text: str) -> float:
    """A number in 0..1 that depends on the text alone, on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
