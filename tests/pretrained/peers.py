"""Small random networks of the transformers package, and what they compute: the golden files of test_parity.py.

    python tests/pretrained/peers.py tests/golden/pretrained

needs PyTorch and transformers: pip install -e ".[parity]" in an environment of its own.
"""

import sys
from pathlib import Path

import numpy as np


def clip(folder: Path, seed: int) -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 59, "pad_token_id": 1}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 4}
    model = random(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)), seed)
    ids = np.array([[0, 5, 9, 59, 1, 1], [0, 44, 3, 7, 12, 59]])
    images = pixels(seed, 3, 16)
    with torch.no_grad():
        texts = model.get_text_features(input_ids=torch.tensor(ids)).pooler_output
        shown = model.get_image_features(pixel_values=nchw(images)).pooler_output
        patches = model.vision_model(pixel_values=nchw(images)).last_hidden_state
    save(model, folder, ids=ids, images=images, texts=unit(texts), shown=unit(shown), patches=patches)


def blip2(folder: Path, seed: int) -> None:
    import torch
    from transformers import Blip2VisionConfig, Blip2VisionModel

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random(Blip2VisionModel(Blip2VisionConfig(image_size=16, patch_size=4, **sizes)), seed)
    images = pixels(seed, 2, 16)
    with torch.no_grad():
        normed = model(pixel_values=nchw(images)).last_hidden_state
    save(model, folder, images=images, normed=normed)


def llama(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random(LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)), seed)
    ids = np.random.default_rng(seed).integers(0, 50, (2, 11))
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
    save(model, folder, ids=ids, logits=logits)


def t5(folder: Path, seed: int) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 8}
    near = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    kind = "gated-gelu" if seed % 2 else "relu"
    model = random(T5ForConditionalGeneration(T5Config(**sizes, **near, feed_forward_proj=kind)), seed)
    rng = np.random.default_rng(seed)
    queries, context = (rng.normal(size=(2, length, 16)).astype(np.float32) for length in (20, 5))
    with torch.no_grad():
        states = model.decoder(
            inputs_embeds=torch.tensor(queries), encoder_hidden_states=torch.tensor(context), use_cache=False
        ).last_hidden_state
    save(model, folder, queries=queries, context=context, states=states)


def random(model, seed: int):
    """All weights drawn anew, wide enough that nothing is nearly linear or nearly zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            drawn = torch.randn(tensor.shape, generator=generator)
            wide = tensor.ndim > 1
            tensor.copy_(drawn / tensor[0].numel() ** 0.5 if wide else 0.3 * drawn + float("norm" in name and "weight" in name))
    return model.eval()


def pixels(seed: int, count: int, side: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, side, side, 3)).astype(np.float32)


def nchw(images: np.ndarray):
    import torch

    return torch.tensor(images.transpose(0, 3, 1, 2))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def save(model, folder: Path, **arrays) -> None:
    model.save_pretrained(folder, safe_serialization=True)
    np.savez_compressed(folder / "expected.npz", **{name: np.asarray(value) for name, value in arrays.items()})


PEERS = {"clip": clip, "blip2": blip2, "llama": llama, "t5": t5}


if __name__ == "__main__":
    for name, make in PEERS.items():
        make(Path(sys.argv[1]) / name, 0)
