"""The rivals once more in float64 numpy, written from the papers' equations: images z [n, h, w, 3] at times u [n]."""

import numpy as np


def features(u):
    angles = u[:, None] * 4.0 * np.arange(1, 17) / 16
    return np.concatenate([u[:, None], np.sin(angles), np.cos(angles)], axis=-1)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(p, x):
    outputs = p["kernel"].shape[1:]
    y = x @ p["kernel"].reshape(len(p["kernel"]), -1)
    return y.reshape(*x.shape[:-1], *outputs) + p.get("bias", 0.0)


def time(p, u):
    return linear(p["second"], silu(linear(p["first"], features(u))))


def standard(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-6)


def layer_norm(p, x):
    return standard(x, -1) * p["scale"] + p["bias"]


def attention(p, x, head):
    """x [n, t, d]; one image and one head at a time."""
    q, k, v = np.moveaxis(linear(p["qkv"], x), -2, 0)
    out = np.zeros_like(x)
    for image in range(len(x)):
        for start in range(0, x.shape[-1], head):
            part = slice(start, start + head)
            scores = np.exp(q[image, :, part] @ k[image, :, part].T / np.sqrt(head))
            out[image, :, part] = scores / scores.sum(-1, keepdims=True) @ v[image, :, part]
    return linear(p["out"], out)


def mlp(p, x):
    return linear(p["down"], gelu(linear(p["up"], x)))


def conv(p, x, stride=1):
    """One output pixel at a time."""
    n, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, h // stride, w // stride, p["kernel"].shape[-1]))
    for i in range(h // stride):
        for j in range(w // stride):
            window = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
            out[:, i, j] = np.tensordot(window, p["kernel"], 3) + p["bias"]
    return out


def cut(z, patch):
    n, h, w, _ = z.shape
    places = [(i, j) for i in range(0, h, patch) for j in range(0, w, patch)]
    return np.stack([z[:, i : i + patch, j : j + patch].reshape(n, -1) for i, j in places], axis=1), places


def joined(patches, places, shape, patch):
    z = np.zeros(shape)
    for index, (i, j) in enumerate(places):
        z[:, i : i + patch, j : j + patch] = patches[:, index].reshape(len(z), patch, patch, 3)
    return z


def one_layer(blocks, index):
    return {k: one_layer(v, index) if isinstance(v, dict) else v[index] for k, v in blocks.items()}


def dit(p, z, u, cfg):
    x, places = cut(z, cfg.patch)
    count = cfg.width // 4
    rate = 10000.0 ** (-np.arange(count) / count)
    fixed = [[f(v / cfg.patch * rate) for v in place for f in (np.sin, np.cos)] for place in places]
    x = linear(p["patch_in"], x) + np.asarray(fixed).reshape(len(places), -1)
    c = silu(time(p["time_in"], u))
    for index in range(cfg.depth):
        b = one_layer(p["blocks"], index)
        b1, s1, g1, b2, s2, g2 = np.moveaxis(linear(b["modulation"], c), 1, 0)[:, :, None]
        x = x + g1 * attention(b["attention"], standard(x, -1) * (1 + s1) + b1, cfg.head_width)
        x = x + g2 * mlp(b["mlp"], standard(x, -1) * (1 + s2) + b2)
    shift, scale = np.moveaxis(linear(p["modulation"], c), 1, 0)[:, :, None]
    return joined(linear(p["patch_out"], standard(x, -1) * (1 + scale) + shift), places, z.shape, cfg.patch)


def uvit(p, z, u, cfg):
    patches, places = cut(z, cfg.patch)
    x = np.concatenate([time(p["time_in"], u)[:, None], linear(p["patch_in"], patches)], axis=1) + p["place_embedding"]
    left = []
    for index in range(cfg.depth):
        mirror = cfg.depth - 1 - index
        if index > mirror:
            skip = one_layer(p["blocks"]["skips"], index - (cfg.depth - cfg.depth // 2))
            x = linear(skip, np.concatenate([x, left[mirror]], axis=-1))
        b = one_layer(p["blocks"]["layers"], index)
        x = x + attention(b["attention"], layer_norm(b["norm_attention"], x), cfg.head_width)
        x = x + mlp(b["mlp"], layer_norm(b["norm_mlp"], x))
        left.append(x)
    out = linear(p["patch_out"], layer_norm(p["norm"], x[:, 1:]))
    return conv(p["conv_out"], joined(out, places, z.shape, cfg.patch))


def group_norm(p, x):
    """Groups of four channels, for fewer than 128 channels."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], 4):
        out[..., start : start + 4] = standard(x[..., start : start + 4], (1, 2, 3))
    return out * p["scale"] + p["bias"]


def residual(p, x, c):
    h = conv(p["conv_in"], silu(group_norm(p["norm_in"], x)))
    scale, shift = np.moveaxis(linear(p["modulation"], c), 1, 0)[:, :, None, None]
    h = conv(p["conv_out"], silu(group_norm(p["norm_out"], h) * (1 + scale) + shift))
    return h + (linear(p["straight"], x) if "straight" in p else x)


def attend(p, x, head):
    flat = group_norm(p["norm"], x).reshape(len(x), -1, x.shape[-1])
    return x + attention(p["attention"], flat, head).reshape(x.shape)


def unet(p, z, u, cfg):
    """Two resolutions with one block each on the way down, heads of cfg.head_width channels."""
    c = silu(time(p["time_in"], u))
    high, low = max(z.shape[1:3]), max(z.shape[1:3]) // 2

    def block(b, x):
        x = residual(b["residual"], x, c)
        return attend(b["attend"], x, cfg.head_width) if "attend" in b else x

    x1 = conv(p["conv_in"], z)
    x2 = block(p["down"][f"{high}_0"], x1)
    x3 = conv(p["strides"][f"{high}"], x2, stride=2)
    x4 = block(p["down"][f"{low}_0"], x3)
    x = residual(p["middle_out"], attend(p["middle"], residual(p["middle_in"], x4, c), cfg.head_width), c)
    x = block(p["up"][f"{low}_0"], np.concatenate([x, x4], axis=-1))
    x = block(p["up"][f"{low}_1"], np.concatenate([x, x3], axis=-1))
    x = conv(p["doublings"][f"{low}"], np.kron(x, np.ones((1, 2, 2, 1))))
    x = block(p["up"][f"{high}_0"], np.concatenate([x, x2], axis=-1))
    x = block(p["up"][f"{high}_1"], np.concatenate([x, x1], axis=-1))
    return conv(p["conv_out"], silu(group_norm(p["norm_out"], x)))
