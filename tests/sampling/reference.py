"""Generation without a cache: every token and every solver step runs whole training rows through the network.

Written from the layout and the solver's table alone. It shares no code with mmdiff/sampling; what it must equal there is
how keys are folded (by stream position, and by 2^30 + number of the image) and which tokens may follow which.
"""

from collections.abc import Iterator

import jax
import numpy as np

from mmdiff import config
from mmdiff.diffusion import grids, prediction, solvers
from mmdiff.diffusion.schedule import make_schedule
from mmdiff.document import IMG, Document, Image
from mmdiff.layout import ImagePiece, ImagePlan, TextPiece, drop_text, lay_out, pack, stack, text_pieces

LENGTH = 128


@jax.jit
def fold(key, number):
    return jax.random.fold_in(key, number)


class Reference:
    def __init__(self, tiny):
        self.tiny, self.cfg, self.vocabulary = tiny, tiny.cfg, tiny.vocabulary

    def row(self, pieces, plans):
        """A batch of one row that holds the stream of `pieces` (no [EOS]) and its noised blocks, and the stream's length."""
        values = 3 * self.cfg.model.patch**2
        given = self.cfg.layout
        layout = config.Layout(max_grid=4, markers=given.markers, time_token=given.time_token)
        laid, _ = lay_out(
            pieces, plans, self.vocabulary, layout, patch_values=values,
            positions=self.cfg.model.positions, end=False,
        )  # fmt: skip
        return stack([pack([laid], LENGTH)]), int((~laid.noised).sum())

    def logits(self, pieces, *, u_of_clean: float = 0.0) -> np.ndarray:
        """Logits of the token after the stream. `u_of_clean` above 0 shows finished images noised: the wrong way."""
        images = [p for p in pieces if isinstance(p, ImagePiece)]
        rows, length = self.row(pieces, [ImagePlan(p.patches is not None, 0) for p in images])
        x = rows.patches / np.float32(127.5) - 1
        eps = np.random.default_rng(0).standard_normal(x.shape)
        z = np.where(rows.is_patch[..., None], (1 - u_of_clean) * x + u_of_clean * eps, 0).astype(np.float32)
        u = np.where(rows.is_patch, u_of_clean, 0).astype(np.float32)
        return np.asarray(self.tiny.forward(rows, z, u)[0][0, length - 1])

    def x_hat(self, pieces, point: np.ndarray, sigma: float) -> np.ndarray:
        """x_hat [n, p] of the last image, drawn at X = `point`: its noised block as in training."""
        images = [p for p in pieces if isinstance(p, ImagePiece)]
        rows, _ = self.row(pieces, [ImagePlan(True, 0)] * (len(images) - 1) + [ImagePlan(False, 1)])
        time = sigma / (1 + sigma)
        alpha, scale = (float(a) for a in make_schedule(self.cfg.diffusion)(np.float32(time)))
        z = (rows.patches / np.float32(127.5) - 1) * rows.is_patch[..., None]
        drawn = rows.noised & rows.is_patch
        z[drawn] = alpha * point
        u = np.where(rows.noised, time, 0).astype(np.float32)
        output = self.tiny.forward(rows, z.astype(np.float32), u)[1][0, drawn[0]]
        source = self.cfg.diffusion.prediction
        return np.asarray(
            prediction.convert(output, alpha * point, alpha, scale, source=source, target="x", clip=1e-4), np.float64
        )

    def draw(self, pieces, key, options) -> np.ndarray:
        """x_hat [n, p] at the end of all solver steps; two whole rows per step with guidance."""
        sampling = self.cfg.sampling
        count = grids.intervals(options.solver, options.steps)
        sigmas = grids.make_grid(options.grid, count, sampling.sigma_max, sampling.sigma_min)
        table = solvers.make_table(options.solver, sigmas)
        noise = lambda step: np.asarray(
            jax.random.normal(fold(key, step), (pieces[-1].patch_count, 3 * self.cfg.model.patch**2))
        )
        base = point = table.level[0] * noise(0)
        before = [np.zeros_like(base)] * solvers.HISTORY
        for step, sigma in enumerate(table.level):
            x_hat = self.x_hat(pieces, point, sigma)
            if options.guidance != 1 and options.guidance_interval[0] <= sigma <= options.guidance_interval[1]:
                without = self.x_hat(drop_text(pieces), point, sigma)
                x_hat = without + options.guidance * (x_hat - without)
            base = sum(c * a for c, a in zip(table.correct[step], (base, point, x_hat, *before), strict=True))
            point = sum(c * a for c, a in zip(table.predict[step], (base, x_hat, *before[:-1]), strict=True))
            point = point + table.noise_scale[step] * noise(step + 1)
            before = [x_hat, *before[:-1]]
        return x_hat

    def generate(self, document: Document, key, options, drawn: Iterator[Image]) -> Iterator[tuple]:
        """Greedy generation of one document, as events: ("logits", logits), ("token", id), ("image", x_hat, Image).

        After each image the pixels go on as `drawn` says: rounding to 8 bits may fall either way.
        """
        vocabulary, pieces = self.vocabulary, []
        budget, images = options.max_tokens, options.max_images
        number, queue, asked = 0, list(document.segments), False
        while queue or budget > 0:
            if queue and queue[0] is not IMG:
                pieces += text_pieces(Document(queue.pop(0)), vocabulary, self.cfg.model.patch)
                continue
            allowed = np.zeros(vocabulary.size, bool)
            asked = bool(queue)
            if asked:
                queue.pop(0)
                allowed[vocabulary.img] = True
            else:
                allowed[slice(*vocabulary.text_range)] = True
                allowed[[vocabulary.eos, vocabulary.img]] = True, images > 0
            if asked and options.image_size:
                grid = [side // self.cfg.model.patch for side in options.image_size]
            else:
                logits = self.logits(pieces)
                yield "logits", logits
                token = int(np.where(allowed, logits, -np.inf).argmax())
                yield "token", token
                if token == vocabulary.eos:
                    return
                if token != vocabulary.img:
                    pieces.append(TextPiece(np.asarray([token], np.int32)))
                    budget -= 1
                    continue
                images -= not asked
                grid = []
                for index, limits in enumerate((vocabulary.rows_range, vocabulary.cols_range)):
                    if options.image_size:
                        size = options.image_size[index] // self.cfg.model.patch
                    else:  # the size tokens so far stand at the end of the stream like text
                        prefix = [vocabulary.img, *([vocabulary.rows(grid[0])] if grid else [])]
                        logits = self.logits([*pieces, TextPiece(np.asarray(prefix, np.int32))])
                        size = int(logits[slice(*limits)].argmax()) + 1
                        yield "token", limits[0] + size - 1
                    grid.append(size)
            pieces.append(ImagePiece(None, *grid))
            x_hat = self.draw(pieces, fold(key, 2**30 + number), options)
            image = next(drawn)
            yield "image", x_hat, image
            pieces[-1] = text_pieces(Document(image), vocabulary, self.cfg.model.patch)[0]
            number += 1
