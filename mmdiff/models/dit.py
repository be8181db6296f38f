from flax import nnx


class DiT(nnx.Module):
    def __init__(self, cfg, size, rngs):
        raise NotImplementedError
