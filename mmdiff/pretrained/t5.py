"""T5's decoder: learned queries that read an image's features one after another, as Emu's causal former does.

    x += out(attention(rms x) with a bias by distance);  x += out(attention(rms x, context));  x += down(act(up(rms x)))

Scores are not divided by the root of a head's width. Names are those of `T5ForConditionalGeneration` of the transformers
package (for example t5-base); its encoder and its words are left alone. Letters: b texts, t positions, s positions of the
context, d width. Sources: T5, arXiv 1910.10683; Emu, arXiv 2307.05222.
"""

from pathlib import Path
from types import UnionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmdiff.pretrained.encoder import ACTIVATIONS
from mmdiff.pretrained.load import Rule, load_folder, supported, transposed

BLOCK = r"decoder\.block\.(\d+)\.layer"
RULES = [
    *(
        Rule(rf"{BLOCK}\.{theirs}\.{letter[0]}\.weight", f"layers/{{}}/{ours}/{letter}/kernel", transposed)
        for theirs, ours in ((r"0\.SelfAttention", "own"), (r"1\.EncDecAttention", "cross"))
        for letter in ("q", "k", "v", "out")
    ),
    Rule(r"decoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "bias"),
    *(
        Rule(rf"{BLOCK}\.{number}\.layer_norm\.weight", f"layers/{{}}/norm_{name}/scale")
        for number, name in enumerate(("own", "cross", "mlp"))
    ),
    Rule(rf"{BLOCK}\.2\.DenseReluDense\.wi(?:_0)?\.weight", "layers/{}/up/kernel", transposed),
    Rule(rf"{BLOCK}\.2\.DenseReluDense\.wi_1\.weight", "layers/{}/gate/kernel", transposed),
    Rule(rf"{BLOCK}\.2\.DenseReluDense\.wo\.weight", "layers/{}/down/kernel", transposed),
    Rule(r"decoder\.final_layer_norm\.weight", "norm/scale"),
]
IGNORED = [
    *(r"encoder\..*", r"shared\.weight", r"lm_head\.weight", r"decoder\.embed_tokens\.weight"),
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # in the first files, read by nothing
]
SIZES: dict[str, type | UnionType] = {
    **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads", "num_layers"), int),
    "num_decoder_layers": int | None,
}
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("t5",),
    "feed_forward_proj": tuple(f"{gated}{name}" for gated in ("", "gated-") for name in ACTIVATIONS),
}


def t5_config(told: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The config.json of a T5, which `where` names. Raises DataError for another network or an unknown activation."""
    return supported(told, where, SIZES, ONLY)


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, head: int, rngs: nnx.Rngs):
        self.heads = heads
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.q, self.k, self.v = (linear(width, heads * head) for _ in range(3))
        self.out = linear(heads * head, width)

    def __call__(self, x: jax.Array, context: jax.Array, bias: jax.Array | None, causal: bool) -> jax.Array:
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        read = jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal, scale=1.0)
        return self.out(read.reshape(*x.shape[:2], -1))


class T5Layer(nnx.Module):
    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        width, hidden, epsilon = cfg["d_model"], cfg["d_ff"], cfg.get("layer_norm_epsilon", 1e-6)
        kind = cfg.get("feed_forward_proj", "relu")
        self.activation = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
        self.own, self.cross = (Attention(width, cfg["num_heads"], cfg["d_kv"], rngs) for _ in range(2))
        self.norm_own, self.norm_cross, self.norm_mlp = (nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs) for _ in range(3))
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.up, self.down = linear(width, hidden), linear(hidden, width)
        self.gate = linear(width, hidden) if kind.startswith("gated-") else None

    def __call__(self, x: jax.Array, context: jax.Array, bias: jax.Array) -> jax.Array:
        y = self.norm_own(x)
        x = x + self.own(y, y, bias, causal=True)
        x = x + self.cross(self.norm_cross(x), context, None, causal=False)
        y = self.norm_mlp(x)
        made = ACTIVATIONS[self.activation](self.up(y))
        return x + self.down(made if self.gate is None else made * self.gate(y))


class T5Decoder(nnx.Module):
    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        self.buckets = cfg.get("relative_attention_num_buckets", 32)
        self.farthest = cfg.get("relative_attention_max_distance", 128)
        self.bias = nnx.Param(jnp.zeros((self.buckets, cfg["num_heads"])))
        self.layers = nnx.List([T5Layer(cfg, rngs) for _ in range(cfg.get("num_decoder_layers") or cfg["num_layers"])])
        self.norm = nnx.RMSNorm(cfg["d_model"], epsilon=cfg.get("layer_norm_epsilon", 1e-6), rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Queries [b, t, d], each of which reads those before it and all of the context [b, s, d], to states [b, t, d]."""
        bias = self.bias[...][buckets(x.shape[1], self.buckets, self.farthest)].transpose(2, 0, 1)[None]
        for layer in self.layers:
            x = layer(x, context, bias)
        return self.norm(x)


def buckets(length: int, count: int, farthest: int) -> np.ndarray:
    """Number of the bias between each query and each key before it, int [t, t]: distances below count / 2 have one each,
    longer ones share the rest by their logarithm up to `farthest`."""
    distance = np.maximum(np.arange(length)[:, None] - np.arange(length), 0)
    exact = count // 2
    share = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(farthest / exact)
    shared = exact + (share * (count - exact)).astype(int)
    return np.where(distance < exact, distance, np.minimum(shared, count - 1))


def load_t5_decoder(folder: str | Path, **options) -> T5Decoder:
    """From a folder with config.json and safetensors.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module` and `t5_config`.
    """
    return load_folder(T5Decoder, folder, RULES, t5_config, ignored=IGNORED, **options)
