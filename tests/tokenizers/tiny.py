"""Small tokenizers."""

from mmdiff.config import Config, Data, Layout, Model, Optimizer, Tokenizer, Training

SIZE = 8, 16  # height and width
MODELS = {
    "conv": Model(network="conv_autoencoder", width=8, depth=1, patch=4, channels=(1, 1, 2), head_width=8, compute="float32"),
    "vit": Model(network="vit_autoencoder", width=16, depth=2, patch=4, head_width=8, compute="float32"),
}
QUANTIZERS = {
    "vq": Tokenizer(quantizer="vq", codes=24, code_width=4),
    "rotation": Tokenizer(quantizer="vq", codes=24, code_width=4, gradient="rotation", normalise=False),
    "vq_loss": Tokenizer(quantizer="vq", codes=24, code_width=4, update="loss"),
    "simvq": Tokenizer(quantizer="simvq", codes=24, code_width=4),
    "fsq": Tokenizer(quantizer="fsq", levels=(4, 3, 3)),
    "lfq": Tokenizer(quantizer="lfq", code_width=5),
    "bsq": Tokenizer(quantizer="bsq", code_width=5),
    "none": Tokenizer(quantizer="none", code_width=4),
}


def experiment(model: str = "conv", tokenizer: Tokenizer = QUANTIZERS["vq"], **training) -> Config:
    chosen = MODELS[model]
    return Config(
        model=chosen,
        tokenizer=tokenizer,
        layout=Layout(row_length=2 * SIZE[0] * SIZE[1] // chosen.patch**2, markers=False),
        data=Data(image_size=SIZE),
        optimizer=Optimizer(learning_rate=5e-3, warmup=1),
        training=Training(**{"batch_size": 4} | training),
    )
