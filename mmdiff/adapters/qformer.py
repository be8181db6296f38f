"""BLIP-2's Q-Former: learned queries that read one another in every layer, and the image in every second one.

    x <- norm(x + attention(x));   queries <- norm(queries + cross(queries, norm features)), layers 0, 2, ..;
    x <- norm(x + mlp(x))                                                  norms behind, as in BERT

A text may stand behind the queries: both share the attention, and a mask says who reads whom; only the queries read the
image, and the text has MLPs of its own (mmdiff/adapters/qformer_losses.py). Behind a front end there is no text, and a
linear layer makes vectors of the model's width of the queries.

Letters: n images, s positions of the tower, f its width, k queries, t positions of a text, w width, d the model's.
Source: Li et al., arXiv 2301.12597.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.adapters.layers import MLP, Attention, Norm, linear
from mmdiff.nn.layers import gather, parameter
from mmdiff.parallel.sharding import Placement


class Behind(nnx.Module):
    """norm(x + mlp(x)): of the queries, or of a text."""

    def __init__(self, width: int, rngs: nnx.Rngs, place: Placement):
        self.mlp, self.norm = MLP(width, rngs, place), Norm(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x + self.mlp(x))


class QFormerLayer(nnx.Module):
    def __init__(self, width: int, features: int, heads: int, crossed: bool, rngs: nnx.Rngs, place: Placement):
        self.own, self.norm_own = Attention(width, width, heads, rngs, place), Norm(width, rngs)
        self.crossed = crossed
        if crossed:
            self.cross, self.norm_cross = Attention(width, features, heads, rngs, place), Norm(width, rngs)
        self.behind = Behind(width, rngs, place)

    def __call__(
        self, queries: jax.Array, text: jax.Array, features: jax.Array | None, mask: jax.Array | None, behind: Behind | None
    ) -> tuple[jax.Array, jax.Array]:
        """Queries [n, k, w], text [n, t, w] (either may be empty), features [n, s, f]; mask as of `QFormer`."""
        count = queries.shape[1]
        x = jnp.concatenate([queries, text], axis=1)
        x = self.norm_own(x + self.own(x, x, mask))
        queries, text = x[:, :count], x[:, count:]
        if features is not None:
            if self.crossed:
                queries = self.norm_cross(queries + self.cross(queries, features))
            queries = self.behind(queries)
        return queries, text if behind is None else behind(text)


class QFormer(nnx.Module):
    def __init__(
        self, inputs: int, tokens: int, width: int, depth: int, heads: int, rngs: nnx.Rngs, place: Placement
    ):
        self.width, self.place = width, place
        self.queries = parameter(jax.random.normal(rngs.params(), (tokens, width)) * 0.02, (None, None))
        self.norm_features, self.norm_queries = Norm(inputs, rngs), Norm(width, rngs)
        self.layers = nnx.List([QFormerLayer(width, inputs, heads, i % 2 == 0, rngs, place) for i in range(depth)])

    def __call__(
        self,
        features: jax.Array | None,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        behind: Sequence[Behind] = (),
    ) -> tuple[jax.Array, jax.Array]:
        """Final states of the queries [n, k, w] and of a text [n, t, w].

        Args:
          features: of the images [n, s, f]; None: the text alone, without queries.
          text: embedded [n, t, w]. behind: of the text, one for each layer.
          mask: bool [n or 1, 1, k + t, k + t], queries first: who reads whom; None: everybody everybody.
        """
        given = features if features is not None else text
        if given is None:
            raise ValueError("neither features nor a text.")
        nothing = jnp.zeros((len(given), 0, self.width), given.dtype)
        text, queries = nothing if text is None else text, nothing
        if features is not None:
            table = self.norm_queries(gather(self.queries, given.dtype, self.place))
            queries, features = jnp.broadcast_to(table, (len(given), *table.shape)), self.norm_features(features)
        for index, layer in enumerate(self.layers):
            queries, text = layer(queries, text, features, mask, behind[index] if behind else None)
        return queries, text


class QFormerAdapter(nnx.Module):
    """A Q-Former without text, and the layer to the model's width."""

    def __init__(
        self, inputs: int, outputs: int, tokens: int, width: int, depth: int, heads: int, rngs: nnx.Rngs, place: Placement
    ):
        self.former = QFormer(inputs, tokens, width, depth, heads, rngs, place)
        self.out = linear(width, outputs, rngs, place)

    def __call__(self, features: jax.Array) -> jax.Array:
        """[n, s, f] to [n, k, d]."""
        return self.out(self.former(features)[0])
