"""LLaMA: a language model whose weights the user brings, as a frozen reader and writer of tokens.

    x += out(attention(rms x));  x += down(silu(gate(rms x)) * up(rms x))         positions by rotation of q and k

Names are those of `LlamaForCausalLM` of the transformers package (LLaMA-2 and its like, also with fewer key than query
heads; no scaled rotations). Letters: b texts, t positions, s positions of a cache, d width, c width of a head. Source:
Touvron et al., arXiv 2307.09288.
"""

from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmdiff.pretrained.load import OURS, Rule, load_module, read_config, supported, transposed

LAYER = r"model\.layers\.(\d+)"
RULES = [
    Rule(r"model\.embed_tokens\.weight", "embedding"),
    *(Rule(rf"{LAYER}\.self_attn\.{name}_proj\.weight", f"layers/{{}}/{name}/kernel", transposed) for name in "qkv"),
    Rule(rf"{LAYER}\.self_attn\.o_proj\.weight", "layers/{}/out/kernel", transposed),
    *(Rule(rf"{LAYER}\.mlp\.{name}_proj\.weight", f"layers/{{}}/{name}/kernel", transposed) for name in ("gate", "up", "down")),
    Rule(rf"{LAYER}\.input_layernorm\.weight", "layers/{}/norm_attention/scale"),
    Rule(rf"{LAYER}\.post_attention_layernorm\.weight", "layers/{}/norm_mlp/scale"),
    Rule(r"model\.norm\.weight", "norm/scale"),
    Rule(r"lm_head\.weight", "head/kernel", transposed),
]
IGNORED = [r".*\.rotary_emb\.inv_freq"]
SIZES: dict[str, type | UnionType] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), int),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict | None),
}
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
}
ROTATION: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "factor": (1, None),
    "partial_rotary_factor": (1, None),
}


def llama_config(told: dict[str, Any], where: str | Path = "config.json") -> dict[str, Any]:
    """The config.json of a LLaMA-1 or 2, which `where` names. Raises DataError if it asks for anything else."""
    supported(told, where, SIZES, ONLY)
    for name in ("rope_scaling", "rope_parameters"):
        supported(told.get(name) or {}, f"{where}: {name}", {}, ROTATION)
    return told


class Cache(NamedTuple):
    """Keys and values [layers, b, s, heads, c]; positions before `length` are written."""

    k: jax.Array
    v: jax.Array
    length: jax.Array  # int32 []


class LlamaLayer(nnx.Module):
    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        width, hidden, epsilon = cfg["hidden_size"], cfg["intermediate_size"], cfg.get("rms_norm_eps", 1e-6)
        self.heads = cfg["num_attention_heads"]
        self.few = cfg.get("num_key_value_heads") or self.heads
        self.base = float(cfg.get("rope_theta") or (cfg.get("rope_parameters") or {}).get("rope_theta", 10000.0))
        head = cfg.get("head_dim") or width // self.heads
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.norm_attention = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.q, self.out = linear(width, self.heads * head), linear(self.heads * head, width)
        self.k, self.v = (linear(width, self.few * head) for _ in range(2))
        self.norm_mlp = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def __call__(self, x: jax.Array, position: jax.Array, past: tuple[jax.Array, jax.Array] | None, allowed: jax.Array):
        """x [b, t, d]; past: buffers of keys and values [b, s, heads, c]; allowed: bool [b, t, s]. Returns x, keys, values."""
        y = self.norm_attention(x)
        split = lambda a, heads: a.reshape(*a.shape[:2], heads, -1)
        q = rotated(split(self.q(y), self.heads), position, self.base)
        k, v = rotated(split(self.k(y), self.few), position, self.base), split(self.v(y), self.few)
        if past is not None:
            start = position[0, 0]
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(past, (k, v), strict=True)
            )
        read = jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None])
        x = x + self.out(read.reshape(*x.shape[:2], -1))
        y = self.norm_mlp(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), k, v


def rotated(x: jax.Array, position: jax.Array, base: float) -> jax.Array:
    """x [b, t, heads, c] turned by its position [b, t]; the two numbers of a plane stand half a head apart."""
    half = x.shape[-1] // 2
    angle = position[..., None, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class Llama(nnx.Module):
    def __init__(self, cfg: dict[str, Any], rngs: nnx.Rngs):
        """Raises DataError: as of `llama_config`."""
        llama_config(cfg)
        self.embedding = nnx.Param(jnp.zeros((cfg["vocab_size"], cfg["hidden_size"])))
        self.layers = nnx.List([LlamaLayer(cfg, rngs) for _ in range(cfg["num_hidden_layers"])])
        self.norm = nnx.RMSNorm(cfg["hidden_size"], epsilon=cfg.get("rms_norm_eps", 1e-6), rngs=rngs)
        tied = cfg.get("tie_word_embeddings", False)
        self.head = None if tied else nnx.Linear(cfg["hidden_size"], cfg["vocab_size"], use_bias=False, rngs=rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]

    def cache(self, count: int, positions: int) -> Cache:
        """An empty one, for so many texts and positions."""
        one = self.layers[0]
        head = one.k.kernel.shape[1] // one.few
        empty = jnp.zeros((len(self.layers), count, positions, one.few, head), self.embedding.dtype)
        return Cache(empty, empty, jnp.zeros((), jnp.int32))

    def __call__(
        self, x: jax.Array, cache: Cache | None = None, first: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Embeddings [b, t, d] of tokens (or of images between them) behind a cache to states [b, t, d] and the cache with
        them; logits are `logits(states)`.

        Args:
          cache: must have room for all of them: cache.length + t <= s is the caller's to guarantee, since length is known
            only when the program runs; past the end, what was written is overwritten.
          first: int [b], where each text begins; what stands before it is padding that nobody reads, and since positions
            only count relative to each other the text does not notice where it stands. None: all at 0.
        Raises:
          ValueError: more tokens than the whole cache has positions.
        """
        count, length = x.shape[:2]
        if cache is not None and length > cache.k.shape[2]:
            raise ValueError(f"{length} tokens behind a cache of {cache.k.shape[2]} positions; make a longer one.")
        start = 0 if cache is None else cache.length
        position = jnp.broadcast_to(start + jnp.arange(length), (count, length))
        keys = jnp.arange(length if cache is None else cache.k.shape[2])
        allowed = keys <= position[..., None]
        if first is not None:
            allowed &= keys >= first[:, None, None]
        kept = []
        for number, each in enumerate(self.layers):
            past = None if cache is None else (cache.k[number], cache.v[number])
            x, k, v = each(x, position, past, allowed)
            kept.append((k, v))
        if cache is not None:
            cache = Cache(jnp.stack([k for k, _ in kept]), jnp.stack([v for _, v in kept]), cache.length + length)
        return self.norm(x), cache

    def logits(self, states: jax.Array) -> jax.Array:
        """[b, t, d] to float32 [b, t, v]."""
        head = self.embedding[...].T if self.head is None else self.head.kernel[...]
        return jnp.matmul(states, head, preferred_element_type=jnp.float32)


def load_llama(folder: str | Path, **options) -> Llama:
    """From a folder with config.json and safetensors, whole or in pieces with an index; also of what `save_module` wrote.

    Args:
      options: dtype and place, of `load_module`.
    Raises:
      DataError: as of `load_module` and `llama_config`.
    """
    cfg = llama_config(read_config(folder), Path(folder) / "config.json")
    ignored = [*IGNORED, r"lm_head\.weight"] if cfg.get("tie_word_embeddings") else IGNORED
    rules = [rule for rule in RULES if not (cfg.get("tie_word_embeddings") and rule.ours.startswith("head"))]
    rules = OURS if cfg.get("format") == "mmdiff" else rules
    return load_module(lambda: Llama(cfg, nnx.Rngs(0)), folder, rules, ignored=ignored, **options)
