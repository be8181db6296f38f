from flax import nnx


class UViT(nnx.Module):
    def __init__(self, cfg, size, rngs):
        raise NotImplementedError
