"""Small random networks of the diffusers package, and what they compute: the golden files of test_sd_parity.py.

    python tests/pretrained/sd_peers.py tests/golden/pretrained

needs PyTorch and diffusers, in an environment of its own.
"""

import sys
from pathlib import Path

import numpy as np
from peers import nchw, pixels, random, save


def sd_unet(folder: Path, seed: int, **other) -> None:
    """Three levels, of which the last does not attend; `other` settings for the tests without golden files."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.embeddings import get_timestep_embedding

    sizes = {"block_out_channels": (4, 6, 8), "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 8}
    sizes |= {"cross_attention_dim": 6, "attention_head_dim": 2}
    sizes |= {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
    sizes |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
    model = random(UNet2DConditionModel(**sizes | other), seed)
    faint(model.conv_in, model.down_blocks[0].resnets[0].conv2)
    draw = np.random.default_rng(seed)
    latents, odd = (draw.normal(size=(2, *side, 4)).astype(np.float32) for side in ((8, 8), (6, 5)))
    context, times = draw.normal(size=(2, 5, 6)).astype(np.float32), np.array([7, 981])
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)

    def noise(of: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        allowed = None if mask is None else torch.tensor(mask)
        with torch.no_grad():
            return nhwc(model(nchw(of), torch.tensor(times), torch.tensor(context), encoder_attention_mask=allowed).sample)

    how = {"flip_sin_to_cos": model.config.flip_sin_to_cos, "downscale_freq_shift": model.config.freq_shift}
    save(
        model,
        folder,
        **{"latents": latents, "odd": odd, "times": times, "context": context, "mask": mask},
        **{"noise": noise(latents), "noise_masked": noise(latents, mask), "noise_odd": noise(odd)},
        sinusoids=get_timestep_embedding(torch.tensor(times), 320, **how),
    )


def sd_vae(folder: Path, seed: int) -> None:
    import torch
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (4, 6, 8), "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 16}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = random(AutoencoderKL(**sizes, scaling_factor=0.3), seed)
    faint(model.encoder.conv_in, model.decoder.conv_in, model.decoder.mid_block.resnets[0].conv2)
    images = pixels(seed, 2, 16)
    latents = np.random.default_rng(seed + 1).normal(size=(2, 4, 3, 4)).astype(np.float32)
    with torch.no_grad():
        drawn = model.encode(nchw(images)).latent_dist
        decoded = model.decode(nchw(latents)).sample
    found = {"mean": nhwc(drawn.mean), "log_variance": nhwc(drawn.logvar), "decoded": nhwc(decoded)}
    save(model, folder, images=images, latents=latents, **found)


def faint(*layers) -> None:
    """So weak that the epsilon of the norm which follows decides what is seen."""
    import torch

    with torch.no_grad():
        for tensor in (tensor for layer in layers for tensor in layer.parameters()):
            tensor.mul_(1e-3)


def nhwc(images) -> np.ndarray:
    return images.numpy().transpose(0, 2, 3, 1)


PEERS = {"sd_unet": sd_unet, "sd_vae": sd_vae}


if __name__ == "__main__":
    for name, make in PEERS.items():
        make(Path(sys.argv[1]) / name, 0)
