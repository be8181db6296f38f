"""A tokenizer without its parameters: the network that the training loop sees, and the module it makes.

Parameters are a plain nested dict with the parts

    encoder, decoder      the halves of the autoencoder (conv.py or vit.py)
    quantizer             what the quantizer learns by gradient (quantizers/)
    codebook              what it keeps besides: no gradient, no optimiser, no average ever touches it (v2l: embeddings of
                          words, and the tower that sees images)
    discriminator         with tokenizer.adversarial > 0

of the autoencoders, and others of those with a frozen encoder (semantic.py). `TokenizerNetwork.of` makes either.

Images are float32 [n, h, w, 3] in [-1, 1], all of one size; rows of images alone (layout.markers=False) hold them whole.
Letters: n images, l codes of an image, c numbers of a code.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmdiff import config
from mmdiff.layout import Rows
from mmdiff.parallel.sharding import Placement
from mmdiff.pretrained.tower import named, numbered
from mmdiff.tokenizers import conv, vit
from mmdiff.tokenizers.discriminator import Discriminator
from mmdiff.tokenizers.quantizers.base import Learning, Quantized, Quantizer, make_quantizer
from mmdiff.tokenizers.quantizers.v2l import V2L

if TYPE_CHECKING:
    from mmdiff.data.batches import Batches

UNTRAINED = "codebook"


class Autoencoder(nnx.Module):
    """The parts that are modules."""

    def __init__(self, network: "TokenizerNetwork", rngs: nnx.Rngs):
        cfg, settings, grid, place = network.cfg, network.tokenizer, network.grid, network.place
        width = network.quantizer.width
        self.encoder: conv.Encoder | vit.Encoder
        self.decoder: conv.Decoder | vit.Decoder
        if cfg.network == "conv_autoencoder":
            self.encoder = conv.Encoder(cfg, width, rngs, place)
            self.decoder = conv.Decoder(cfg, grid, width, rngs, place, words=network.global_tokens, residual=settings.residual)
        else:
            self.encoder = vit.Encoder(cfg, grid, settings.latents, width, rngs, place)
            self.decoder = vit.Decoder(
                cfg, grid, settings.latents, width, rngs, place, words=network.global_tokens, residual=settings.residual
            )
        if settings.adversarial:
            self.discriminator = Discriminator(cfg, rngs, place)


class Seen(NamedTuple):
    """What a tokenizer makes of images; what is not used of it costs nothing inside jit."""

    made: jax.Array
    """float32 [n, h, w, 3]: what the codes keep of them."""
    ids: jax.Array
    """int32 [n, l]."""
    lengths: jax.Array
    """int32 [n]; how many of an image's ids, from the first on, are its codes."""
    more: dict[str, jax.Array]
    """Whatever else validation is to know of each image, [n]."""


Objective = Callable[[Any, Rows, jax.Array, jax.Array], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]
"""(parameters, rows, key, step) to the loss, what of it is logged, and the codebook after this batch."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A tokenizer with its parameters, for use inside jit."""

    module: Autoencoder
    quantizer: Quantizer
    params: Any
    codebook: Any

    def encode(self, images: jax.Array) -> jax.Array:
        """[n, h, w, 3] to what is quantised, float32 [n, l, c]."""
        z = self.module.encoder(images)
        return self.quantizer.seen(self.codebook, images, z) if isinstance(self.quantizer, V2L) else z

    def quantise(self, z: jax.Array, learning: Learning | None = None) -> Quantized:
        """[n, l, c], as of `Quantizer`."""
        return self.quantizer(self.params, self.codebook, z, learning)

    def codes(self, ids: jax.Array) -> jax.Array:
        """int32 [n, l] to [n, l, c]."""
        return self.quantizer.decode(self.params, self.codebook, ids)

    def decode(self, codes: jax.Array) -> jax.Array:
        """[n, l, c] to images [n, h, w, 3]."""
        return self.module.decoder.pixels(self.module.decoder.features(codes))

    def seen(self, images: jax.Array, key: jax.Array) -> Seen:
        """Images [n, h, w, 3], coded and given back; `key`: of what is drawn at random in coding, of which there is nothing."""
        quantised = self.quantise(self.encode(images))
        lengths = jnp.full(len(images), quantised.ids.shape[1])
        return Seen(self.decode(quantised.codes), quantised.ids, lengths, {})

    def drawn(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """Images [n, h, w, 3] of ids int32 [n, l], of which the first `lengths` [n] count: here all."""
        return self.decode(self.codes(ids))


@dataclasses.dataclass(frozen=True)
class TokenizerNetwork:
    """See above; what `Network` is to models of documents."""

    cfg: config.Model
    tokenizer: config.Tokenizer
    grid: tuple[int, int]
    """Rows and columns of patches of every image."""
    mesh: Mesh | None = None
    vocabulary_size = 0
    frozen: ClassVar[tuple[str, ...]] = ()
    """Parts that no training changes."""
    dynamic: ClassVar[bool] = False
    """Whether images have different numbers of codes."""

    @staticmethod
    def of(cfg: config.Config, mesh: Mesh | None = None, vocabulary_size: int = 0) -> "TokenizerNetwork":
        """The network of an experiment; `vocabulary_size`: of one that also reads texts (tokenizer.stage=1)."""
        if cfg.fixed_size is None:
            raise config.ConfigError(f"model.network={cfg.model.network!r} needs images of one size: set data.image_size.")
        height, width = cfg.fixed_size
        grid = height // cfg.model.patch, width // cfg.model.patch
        if cfg.model.network in config.SEMANTIC:
            from mmdiff.tokenizers.semantic import semantic_network

            return semantic_network(cfg, grid, mesh, vocabulary_size)
        return TokenizerNetwork(cfg.model, cfg.tokenizer, grid, mesh)

    @property
    def quantizer(self) -> Quantizer:
        return make_quantizer(self.tokenizer)

    @property
    def global_tokens(self) -> int:
        """Codes before those of the places or the latents (v2l)."""
        return self.tokenizer.global_tokens if self.tokenizer.quantizer == "v2l" else 0

    @property
    def length(self) -> int:
        """Codes of an image; of a dynamic tokenizer at most."""
        return self.global_tokens + (self.tokenizer.latents or self.grid[0] * self.grid[1])

    @property
    def code_grid(self) -> tuple[int, int]:
        """Rows and columns in which the codes of an image stand: those of its patches, or one row of latents. Words about the
        whole image (v2l) stand above its patches if they fill rows of their own, else all is one row."""
        (rows, cols), words = self.grid, self.global_tokens
        if self.tokenizer.latents or words % cols:
            return 1, self.length
        return rows + words // cols, cols

    @property
    def bits(self) -> float:
        """Nominal bits of an image: its codes times the logarithm of how many there are, of each kind."""
        quantizer = self.quantizer
        whole = quantizer.global_bits if isinstance(quantizer, V2L) else 0.0
        return whole + (self.length - self.global_tokens) * quantizer.bits

    @property
    def patch_values(self) -> int:
        return 3 * self.cfg.patch**2

    @property
    def place(self) -> Placement:
        return Placement(self.mesh)

    def _module(self, key=0) -> Any:
        return Autoencoder(self, nnx.Rngs(params=key))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters."""
        params, codebook = self.quantizer.init(jax.random.fold_in(key, 1))
        return named(nnx.to_pure_dict(nnx.state(self._module(key)))) | {"quantizer": params, UNTRAINED: codebook}

    def given(self) -> dict[str, Any]:
        """Parameters that come from elsewhere: those of a frozen encoder, and words.

        Raises:
          DataError, ConfigError: a file or folder does not hold what it should.
        """
        if not isinstance(self.quantizer, V2L):
            return {}
        params, codebook = self.quantizer.given()
        return {"quantizer": params, UNTRAINED: codebook}

    def inherited(self, params: dict[str, Any]) -> dict[str, Any]:
        """What of another run's parameters (training.init) this network starts from."""
        return params

    def validate(
        self, cfg: config.Config, params: Any, batches: "Batches", rows: int, between: Callable[[], None]
    ) -> dict[str, float]:
        """Numbers about the first `rows` held-out rows; `between` is called before each batch."""
        from mmdiff.tokenizers.validate import validate

        return validate(self, cfg, params, batches, rows, between)

    def objective(self, cfg: config.Config) -> Objective:
        """What training minimises."""
        from mmdiff.tokenizers.training import objective

        return objective(self, cfg)

    @functools.lru_cache  # noqa: B019  networks are few
    def axes(self) -> dict[str, Any]:
        """The names of every parameter's axes: none, tokenizers are split by rows only."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: (None,) * leaf.ndim, shapes)

    def stored(self, params: dict[str, Any]) -> dict[str, Any]:
        """As of `Network.stored`."""
        return jax.tree.map(lambda leaf: self.place(leaf, *(None,) * leaf.ndim), params)

    def bind(self, params: dict[str, Any]) -> Any:
        """The tokenizer with these parameters: a `Bound`, or what offers the same `seen` and `drawn`."""
        modules = {name: numbered(part) for name, part in params.items() if name not in ("quantizer", UNTRAINED)}
        module = nnx.merge(nnx.graphdef(nnx.eval_shape(self._module)), modules)
        empty: dict[str, Any] = {}  # a checkpoint keeps no empty parts
        return self._bound(module, params.get("quantizer", empty), params.get(UNTRAINED, empty))

    def _bound(self, module: Any, params: Any, codebook: Any) -> Any:
        return Bound(module, self.quantizer, params, codebook)

    def images(self, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """Images float32 [n, h, w, 3] of rows, and which of them are no padding, float32 [n]."""
        count, length = self.grid[0] * self.grid[1], rows.tokens.shape[1]
        missing = -length % count
        patches = jnp.pad(jnp.asarray(rows.patches), ((0, 0), (0, missing), (0, 0))).astype(jnp.float32) / 127.5 - 1.0
        side = {"rows": self.grid[0], "cols": self.grid[1], "p": self.cfg.patch, "q": self.cfg.patch}
        order = "b (n rows cols) (p q c) -> (b n) (rows p) (cols q) c"
        real = jnp.pad(jnp.asarray(rows.is_patch), ((0, 0), (0, missing)))[:, ::count].reshape(-1)
        return self.place(einops.rearrange(patches, order, **side), "rows", None, None, None), real.astype(jnp.float32)
