"""LaVIT as a tokenizer: a code for each patch that the selector keeps, so that images have different numbers of codes.

    f = tower(image);  k = keep(selector(f));  m = merger(f, k);  z = tanh(m W) W'
    codes = quantise(z) where k = 1;  y = decoder(codes, k)
    (1) loss = mean (1 - cos(f, y)) + 2 (rho - mean k)^2 + quantizer's own terms + denoising loss of pixels given y

Means are over the batch, that of k as well: images may differ in length for free (lavit.py). In training all positions are
worked through under the policies of lavit.py; in use the kept ones, packed, to the same result. Which ones are kept is drawn at
random also in use, as published, from a key that the image's own pixels determine; tokenizer.deterministic takes the likelier
choice. An image keeps at least one patch: the one with the best chance. With tokenizer.keep=1 there is no choice: every image
has a code for each patch.

Places of kept patches are not transmitted: the decoder knows only their order. In a document the k codes stand in one row, and
its length is written first, `[IMG] <rows 1> <cols k>`, where LaVIT's language model writes [/IMG] when it has written enough.

Reconstructed, as LaVIT's training is not published: commitment and moving averages of the codebook, the policy in the decoder
(lavit.py), and one run for tokenizer and pixels (pixel_decoder.py).
Source: Jin et al., LaVIT, arXiv 2309.04669. Letters: n images, t patches of the tower, d its width, c numbers of a code.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff import config
from mmdiff.pretrained.tower import Tower
from mmdiff.tokenizers.lavit import RATIO_WEIGHT, Decoder, Merger, Selector, at_least_one, feature_loss, kept
from mmdiff.tokenizers.network import Objective, Seen
from mmdiff.tokenizers.pixel_decoder import PixelDecoder, noise_for
from mmdiff.tokenizers.quantizers.base import Learning, Quantizer
from mmdiff.tokenizers.semantic import DRAWING, Loss, SemanticNetwork, objective_of_images, own_keys, weighted


class Narrow(nnx.Module):
    """[..., d] to [..., c]."""

    def __init__(self, width: int, code_width: int, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, code_width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


class Parts(nnx.Module):
    def __init__(self, network: "LavitNetwork", rngs: nnx.Rngs):
        settings, tower = network.tokenizer, network.tokenizer.tower
        width, code_width = tower.width, network.quantizer.width
        self.tower, self.selector = Tower(tower, rngs), Selector(width, rngs)
        self.merger = Merger(width, settings.depth, tower.heads, rngs, causal=settings.causal)
        self.narrow = Narrow(width, code_width, rngs)
        self.decoder = Decoder(tower.count, width, code_width, settings.depth, tower.heads, rngs)
        shape = network.cfg, network.diffusion, network.sampling, network.grid, (tower.count, width)
        self.pixels = PixelDecoder(*shape, rngs, network.place, square=True)


@dataclasses.dataclass(frozen=True)
class BoundLavit:
    module: Parts
    quantizer: Quantizer
    params: Any
    codebook: Any
    settings: config.Tokenizer

    def keep(self, features: jax.Array, keys: jax.Array | None) -> jax.Array:
        """0 or 1 for each patch, float32 [n, t], straight through; keys [n]: of each image's draws, None: the likelier."""
        if self.settings.keep == 1:
            return jnp.ones(features.shape[:2])
        choice = self.module.selector(features)
        return at_least_one(kept(choice, None) if keys is None else jax.vmap(kept)(choice, keys), choice)

    def coded(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Features [n, t, d], codes [n, t, c], and ids int32 [n, t] of which the first `lengths` [n] are an image's."""
        features, _ = self.module.tower(images)
        keep = self.keep(features, None if self.settings.deterministic else own_keys(images, key))
        packed = self.module.merger.packed(features, keep, keep.shape[1])
        quantised = self.quantizer(self.params, self.codebook, self.module.narrow(packed.x))
        return features, quantised.codes, jnp.where(packed.filled, quantised.ids, 0), packed.filled.sum(-1)

    def features(self, codes: jax.Array, lengths: jax.Array) -> jax.Array:
        """Codes [n, t, c], of which the first `lengths` [n] count, to features [n, t, d]."""
        there = jnp.arange(codes.shape[1]) < lengths[:, None]
        return self.module.decoder(codes, there.astype(jnp.float32))

    def seen(self, images: jax.Array, key: jax.Array) -> Seen:
        """As of `network.Bound`."""
        features, codes, ids, lengths = self.coded(images, key)
        decoded = self.features(codes, lengths)
        more = {"keep_ratio": lengths / ids.shape[1], "feature_cosine": 1 - feature_loss(features, decoded)}
        return Seen(self.module.pixels.draw(decoded, jax.random.key(DRAWING)), ids, lengths, more)

    def drawn(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """As of `network.Bound`."""
        codes = self.quantizer.decode(self.params, self.codebook, ids)
        return self.module.pixels.draw(self.features(codes, lengths), jax.random.key(DRAWING))


@dataclasses.dataclass(frozen=True)
class LavitNetwork(SemanticNetwork):
    dynamic: ClassVar[bool] = True

    @property
    def length(self) -> int:
        return self.tokenizer.tower.count

    def _module(self, key=0) -> Parts:
        return Parts(self, nnx.Rngs(params=key))

    def _bound(self, module: Any, params: Any, codebook: Any) -> BoundLavit:
        return BoundLavit(module, self.quantizer, params, codebook, self.tokenizer)

    def objective(self, cfg: config.Config) -> Objective:
        """That of `losses`."""
        return objective_of_images(self, self.losses, cfg)

    def losses(self, params: Any, images: jax.Array, weight: jax.Array, key: jax.Array, restart: jax.Array | bool) -> Loss:
        """Equation (1)."""
        model = self.bind(params)
        choices, restarts, noise = jax.random.split(key, 3)
        features, _ = model.module.tower(images)
        keep = model.keep(features, jax.random.split(choices, len(images)))
        z = model.module.narrow(model.module.merger(features, keep))
        learning = Learning(restarts, jax.lax.stop_gradient(keep) * weight[:, None], restart)
        quantised = model.quantizer(model.params, model.codebook, z, learning)
        decoded = model.module.decoder(quantised.codes, keep)
        apart = weighted(feature_loss(features, decoded), weight)
        share = weighted(keep.mean(-1), weight)
        denoised = model.module.pixels.losses(images, jax.lax.stop_gradient(decoded), *noise_for(images, weight, noise))
        pixels = weighted(denoised, weight)
        loss = apart + RATIO_WEIGHT * jnp.square(self.tokenizer.keep - share) + quantised.loss + pixels
        metrics = {"image_loss": pixels, "feature_loss": apart, "keep_ratio": share, "quantizer_loss": quantised.loss}
        return loss, (metrics, quantised.state)
