"""Tasks, protocols and the vote: what a copying reader can do, and that nothing reads what is missing."""

import numpy as np
import pytest

from mmdiff.config import ConfigError
from mmdiff.in_context import restoration
from mmdiff.in_context.restoration import RATES, accuracy, changed, corrupted, missing, restored, voted
from mmdiff.in_context.vote import plurality

SIZE, GRID = 300, (8, 8)


class Copier:
    """Writes what most examples write, as a language model that copies would: markers are two tokens that are none."""

    def __init__(self):
        self.asked = []

    def encode(self, text, *, bos=False):
        return [-1] if "Input" in text else [-2] if "Output" in text else []

    def greedy(self, prompts, count):
        self.asked += [len(prompt) for prompt in prompts]
        written = []
        for prompt in prompts:
            ends = [place for place, token in enumerate(prompt) if token == -2][:-1]
            written.append(plurality(np.array([prompt[end + 1 : end + 1 + count] for end in ends]), SIZE))
        return np.stack(written)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, SIZE, (12, 64)).astype(np.int32)


def protocol(tokens, leak, seed=1):
    rng = np.random.default_rng(seed)
    rest = lambda image: np.delete(tokens, image, axis=0)[:10]
    return [corrupted(own if leak else rest(i), own if leak else rest(i), SIZE, rng, others=8) for i, own in enumerate(tokens)]


def test_rates_are_those_published_and_counted_as_there(tokens):
    assert RATES == (0.5, 0.47, 0.44, 0.41, 0.38, 0.35, 0.32, 0.29, 0.26, 0.23)
    (found,) = protocol(tokens[:1], True)
    apart = (found.wanted != tokens[0]).sum(-1)
    most = np.array([int(rate * 72) for rate in RATES])
    assert (apart <= most).all() and (apart >= most - 3).all()  # a random token may be the true one
    np.testing.assert_array_equal(found.given, found.wanted)  # the same replaces both


def test_the_published_protocol_holds_its_answer_and_the_other_does_not(tokens):
    vote = lambda leak: accuracy("rotation", GRID, voted("rotation", tokens, GRID, protocol(tokens, leak), SIZE), tokens).mean()
    assert vote(True) > 0.99
    assert vote(False) < 0.05  # tokens of other images, here unrelated


@pytest.mark.parametrize("task", restoration.TASKS)
def test_a_copying_reader_is_as_good_as_the_vote(task, tokens):
    few, reader, examples = tokens[:3], Copier(), protocol(tokens, True)[:3]
    given = np.where(missing(task, GRID), 0, few) if task in ("inpainting", "outpainting") else few[:, ::-1]
    found = restored(reader, task, given, GRID, examples, before=8)
    np.testing.assert_array_equal(
        found, voted(task, few if task == "inpainting" or task == "outpainting" else given, GRID, examples, SIZE)
    )
    width = 8 if task in ("inpainting", "outpainting") else 2
    assert set(reader.asked) == {11 * (width + 2) + 10 * 2}


def test_what_is_missing_is_not_read_and_what_is_known_stays(tokens):
    class Echo(Copier):
        """Writes the last tokens that it is given."""

        def greedy(self, prompts, count):
            return np.array([prompt[-1 - count : -1] for prompt in prompts])

    given = tokens[:2]
    known = ~missing("inpainting", GRID)
    other = np.where(known, given, (given + 1) % SIZE)
    examples = protocol(tokens, True)[:2]
    one, two = (restored(Echo(), "inpainting", x, GRID, examples, before=4) for x in (given, other))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[:, known], given[:, known])
    np.testing.assert_array_equal(one[:, 18:20], given[:, 16:18])  # the two before the first hole
    np.testing.assert_array_equal(one[:, 20:22], given[:, 16:18])  # and what was written is read next
    visible = np.where(known, (given + 1) % SIZE, given)
    assert (restored(Echo(), "inpainting", visible, GRID, examples, before=4) != one).any()


def test_masks_and_changes():
    assert missing("inpainting", (16, 16)).reshape(16, 16)[4:12, 4:12].all() and missing("inpainting", (16, 16)).sum() == 64
    assert missing("outpainting", (16, 16)).reshape(16, 16)[8:].all() and missing("outpainting", (16, 16)).sum() == 128
    assert missing("shift", GRID).all()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(changed("rotation", images)[0], np.rot90(images[0]))
    np.testing.assert_array_equal(changed("shift", images)[:, :12, :12], images[:, 4:, 4:])
    flat = np.full_like(images, 77)
    np.testing.assert_array_equal(changed("deblurring", flat), flat)
    blurred = changed("deblurring", images)
    assert blurred.std() < 0.5 * images.std() and abs(blurred.mean() - images.mean()) < 3
    np.testing.assert_array_equal(changed("inpainting", images), images)
    with pytest.raises(ConfigError, match="rotation needs square images"):
        changed("rotation", images[:, :8])


def test_plurality():
    assert plurality(np.array([[1, 2], [1, 3], [0, 3], [1, 2]]), 5).tolist() == [1, 2]  # ties: the smallest
