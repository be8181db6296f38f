"""Prompts by which a language model that has seen no image is asked about images: examples first, then the question.

An image is either its global words, strings set side by side without anything between them and read anew by the language
model, or some of its local tokens, whose ids are ids of the language model. Texts of classification and restoration are those
of the V2L Tokenizer (Zhu et al., arXiv 2403.07874) as its published code has them; of captions and questions only the form is
published ("Input: words, output: caption"; "Condition: words. Question: ... Answer: ..."), and the wording is ours.

Each part of a prompt is turned into ids by itself and the ids are joined, as there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mmdiff.in_context.language import Language

INPUT, OUTPUT = "###\nInput: < ", " >\nOutput: "
CLASSES = "For each of the following input output pairs, output is one of {}\n"
RESTORATION = "Learning a new language and predict the {} tokens following the examples.\n"
CAPTION = "Generate a caption based on words that describe an image.\n"
QUESTION = "Answer the question with a single word, based on the condition.\n"
CONDITION, ASKED, ANSWER = "###\nCondition: < ", " > Question: {} ", "Answer: "


class Pair(NamedTuple):
    """Ids of an example."""

    given: Sequence[int]
    wanted: Sequence[int]


def paired(language: Language, instruction: str, pairs: Sequence[Pair], given: Sequence[int]) -> list[int]:
    """Instruction, examples and what the last output is asked for."""
    before, between = language.encode(INPUT), language.encode(OUTPUT)
    ids = language.encode(instruction, bos=True)
    for pair in pairs:
        ids += [*before, *pair.given, *between, *pair.wanted]
    return [*ids, *before, *given, *between]


def image_words(language: Language, words: Sequence[str]) -> list[int]:
    """Ids of an image's global words."""
    return language.encode("".join(words))


def classification(
    language: Language, names: Sequence[str], examples: Sequence[tuple[Sequence[str], str]], words: Sequence[str]
) -> list[int]:
    """Of (words of an image, its class) and the words of the image in question."""
    told = "[" + " or ".join(f"'{name}'" for name in names) + "]"
    pairs = [Pair(image_words(language, given), language.encode(name)) for given, name in examples]
    return paired(language, CLASSES.format(told), pairs, image_words(language, words))


def caption(language: Language, examples: Sequence[tuple[Sequence[str], str]], words: Sequence[str]) -> list[int]:
    """Of (words of an image, its caption) and the words of the image in question."""
    pairs = [Pair(image_words(language, given), language.encode(f"{text}.")) for given, text in examples]
    return paired(language, CAPTION, pairs, image_words(language, words))


def question(
    language: Language, examples: Sequence[tuple[Sequence[str], str, str]], words: Sequence[str], asked: str
) -> list[int]:
    """Of (words of an image, question, answer), the words of the image in question and what is asked about it."""
    ids = language.encode(QUESTION, bos=True)
    for given, about, answer in [*examples, (words, asked, None)]:
        ids += [*language.encode(CONDITION), *image_words(language, given), *language.encode(ASKED.format(about))]
        ids += language.encode(ANSWER) + (language.encode(f"{answer}.") if answer is not None else [])
    return ids


def restoration(language: Language, pairs: Sequence[Pair], given: Sequence[int], count: int) -> list[int]:
    """Of (tokens, the `count` tokens that belong to them) and the tokens in question."""
    return paired(language, RESTORATION.format(count), pairs, given)
