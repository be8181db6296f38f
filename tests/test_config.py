"""Configuration: it reads back, refuses nonsense with the remedy, and the command line changes any field."""

import dataclasses
import json
import re

import pytest

from mmdiff import config_files
from mmdiff.cli import main as command
from mmdiff.cli.train import override, take_option, unknown_field
from mmdiff.config import (
    SEMANTIC,
    TOKENIZERS,
    Config,
    ConfigError,
    Data,
    Diffusion,
    FewStep,
    FrontEnd,
    Layout,
    Mesh,
    Model,
    Optimizer,
    Sampling,
    Tokenizer,
    Tower,
    Training,
)

EVERYTHING = Config(
    name="all",
    model=Model(width=64, depth=3, block="attention", head_width=32, remat="full"),
    layout=Layout(row_length=99, noised_copies=2),
    diffusion=Diffusion(prediction="eps", shift=2.5),
    data=Data(source="shapes", image_size=(48, 64), generator=(("draw", 0.5), ("story", 1.0))),
    optimizer=Optimizer(name="muon", final=0.1),
    training=Training(steps=7, accumulate=4),
    sampling=Sampling(guidance_interval=(0.1, float("inf")), prompts=("a", "b")),
)


@pytest.mark.parametrize("cfg", [Config(), EVERYTHING], ids=["default", "everything"])
def test_json_round_trip(cfg):
    back = Config.from_json(cfg.to_json())
    assert back == cfg and hash(back) == hash(cfg)
    assert back.fingerprint() == cfg.fingerprint()


def test_fingerprints_see_every_field():
    assert Config().fingerprint() != dataclasses.replace(Config(), name="other").fingerprint()
    assert Config().fingerprint() != EVERYTHING.fingerprint()


def test_missing_fields_take_their_defaults():
    assert Config.from_json('{"model": {"width": 512}}') == Config(model=Model(width=512))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"widht": 3}}, r"unknown field 'model\.widht'; did you mean 'model\.width'\?"),
        ({"modle": {}}, r"unknown field 'modle'; did you mean 'model'\?"),
        ({"model": {"width": "wide"}}, r"model\.width='wide' has the wrong type: expected int"),
        ({"model": {"width": 1.5}}, r"model\.width=1\.5 has the wrong type: expected int"),
        ({"model": {"width": True}}, r"model\.width=True has the wrong type"),
        ({"model": {"lossless": 1}}, r"model\.lossless=1 has the wrong type: expected bool"),
        ({"optimizer": {"learning_rate": "1e-3"}}, r"optimizer\.learning_rate='1e-3' has the wrong type: expected float"),
        ({"data": {"image_size": 32}}, r"data\.image_size=32 has the wrong type"),
        ({"model": {"block": "mamba"}}, r"model\.block='mamba' is not one of 'gau', 'attention'"),
        ({"training": {"seed": None}}, r"training\.seed=None has the wrong type"),
    ],
)
def test_bad_json_is_refused_with_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_json(json.dumps(values))


def test_whole_numbers_pass_for_floats():
    assert Config.from_json('{"optimizer": {"learning_rate": 1}}').optimizer.learning_rate == 1


def with_codes(model=Model(), images="next_code", **groups):  # noqa: B008  frozen
    """Codes in place of patches."""
    data = Data(source="shapes", tokenizer="runs/vq")
    return Config(layout=Layout(images=images), data=data, model=model, **groups)


def tokenizing(network, **groups):
    """An image tokenizer."""
    given = {"encoder": "clip"} if network in SEMANTIC else {}
    return Config(
        model=Model(network=network, width=64, lossless=False),
        tokenizer=Tokenizer(latents=8 * (network == "seed"), **given),
        layout=Layout(markers=False, row_length=64),
        data=Data(source="shapes"),
        training=Training(init="one"),
        **groups,
    )


TOWER = Tower(side=32, patch=8, width=16, hidden=16, depth=2, heads=2)
INVALID = [
    (lambda: Model(width=0), "model.width", "0"),
    (lambda: FewStep(share=0.0), "few_step.share", "0.0"),
    (lambda: FewStep(guidance=-1.0), "few_step.guidance", "-1.0"),
    (lambda: Tokenizer(decay=1.0), "tokenizer.decay", "1.0"),
    (lambda: Tokenizer(quantizer="fsq", codes=64), "tokenizer.codes", "64"),
    (lambda: Tokenizer(quantizer="lfq", gradient="rotation"), "tokenizer.gradient", "'rotation'"),
    (lambda: Tokenizer(quantizer="pq"), "tokenizer.quantizer", "'pq' must be one of 'vq', "),
    (lambda: Tokenizer(perceptual=0.5), "tokenizer.perceptual", "0.5"),
    (lambda: Tokenizer(update="loss", restart=0.2), "tokenizer.restart", "tokenizer.update='loss'"),
    (lambda: Tokenizer(update="loss", decay=0.9), "tokenizer.decay", "tokenizer.update='loss'"),
    (lambda: Tokenizer(adversarial_start=5), "tokenizer.adversarial_start", "tokenizer.adversarial=0"),
    (lambda: Tokenizer(keep=1.0, deterministic=True), "tokenizer.deterministic", "tokenizer.keep=1"),
    (lambda: tokenizing("lavit", diffusion=Diffusion(image_scale=2.0)), "diffusion.image_scale", "2.0"),
    (lambda: tokenizing("seed", diffusion=Diffusion(image_scale=2.0)), "diffusion.image_scale", "2.0"),
    (lambda: tokenizing("lavit", sampling=Sampling(guidance=2.0)), "sampling.guidance", "2.0"),
    (lambda: tokenizing("seed", sampling=Sampling(guidance_rescale=0.5)), "sampling.guidance_rescale", "0.5"),
    (lambda: tokenizing("lavit", sampling=Sampling(guidance_interval=(0.1, 1.0))), "sampling.guidance_interval", "(0.1, 1.0)"),
    (lambda: tokenizing("vit_autoencoder", diffusion=Diffusion(image_scale=2.0)), "diffusion.image_scale", "2.0"),
    (lambda: tokenizing("vit_autoencoder", diffusion=Diffusion(shift=2.0)), "diffusion.shift", "2.0"),
    (lambda: tokenizing("vit_autoencoder", sampling=Sampling(steps=4)), "sampling.steps", "4"),
    (lambda: tokenizing("vit_autoencoder", sampling=Sampling(solver="ddim")), "sampling.solver", "'ddim'"),
    (lambda: tokenizing("vit_autoencoder", sampling=Sampling(guidance=2.0)), "sampling.guidance", "2.0"),
    (lambda: Tokenizer(tower=Tower(side=32)), "tokenizer.tower", "patch=0"),
    (lambda: Tokenizer(tower=Tower(activation="gelu")), "tokenizer.tower", "side=0"),
    (lambda: Model(depth=-1), "model.depth", "-1"),
    (lambda: Model(width=40, patch=4), "model.width", "40"),
    (lambda: Model(key_width=6), "model.key_width", "6"),
    (lambda: Model(block="attention", width=100), "model.width", "100"),
    (lambda: Model(block="attention", width=54, head_width=54), "model.head_width", "54"),
    (lambda: Model(rope_base=1.0), "model.rope_base", "1.0"),
    (lambda: Layout(row_length=3), "layout.row_length", "3"),
    (lambda: Layout(trailing_context=1.5), "layout.trailing_context", "1.5"),
    (lambda: Layout(text_drop=-0.1), "layout.text_drop", "-0.1"),
    (lambda: Layout(max_context_u=2.0), "layout.max_context_u", "2.0"),
    (lambda: Layout(noised_copies=0), "layout.noised_copies", "0"),
    (lambda: Layout(noised_copies=2, context="noised"), "layout.noised_copies", "'clean'"),
    (lambda: Layout(max_grid=0), "layout.max_grid", "0"),
    (lambda: Layout(images="read", markers=False), "layout.images", "read"),
    (lambda: Layout(images="next_code", noised_copies=2), "layout.noised_copies", "next_code"),
    (lambda: Config(layout=Layout(images="next_code")), "data.tokenizer", "next_code"),
    (lambda: Config(data=Data(tokenizer="runs/vq")), "data.tokenizer", "runs/vq"),
    (lambda: with_codes(), "model.lossless", "codes"),
    (lambda: with_codes(Model(lossless=False, time="none")), "model.time", "none"),
    (lambda: with_codes(Model(lossless=False), diffusion=Diffusion(shift=2.0)), "diffusion.shift", "2.0"),
    (lambda: with_codes(Model(lossless=False), sampling=Sampling(steps=4)), "sampling.steps", "4"),
    (lambda: Config(layout=Layout(images="read"), model=Model(zero_head=False)), "model.zero_head", "False"),
    (lambda: Config(layout=Layout(images="read", trailing_context=0.5)), "layout.trailing_context", "0.5"),
    (lambda: Config(layout=Layout(images="read"), sampling=Sampling(guidance=2.0)), "sampling.guidance", "2.0"),
    (lambda: with_codes(images="next_vector", sampling=Sampling(guidance=2.0)), "sampling.guidance", "'next_vector'"),
    (lambda: Diffusion(time_std=0.0), "diffusion.time_std", "0.0"),
    (lambda: Diffusion(shift=-1.0), "diffusion.shift", "-1.0"),
    (lambda: Diffusion(clip=0.0), "diffusion.clip", "0.0"),
    (lambda: Diffusion(weighting="min_snr", weighting_value=-1.0), "diffusion.weighting_value", "-1.0"),
    (lambda: Diffusion(image_scale=-1.0), "diffusion.image_scale", "-1.0"),
    (lambda: Data(size=0), "data.size", "0"),
    (lambda: Data(vocabulary_size=256), "data.vocabulary_size", "256"),
    (lambda: Data(max_objects=4), "data.max_objects", "4"),
    (lambda: Data(image_size=(0, 4)), "data.image_size", "(0, 4)"),
    (lambda: Optimizer(learning_rate=0.0), "optimizer.learning_rate", "0.0"),
    (lambda: Optimizer(warmup=-1), "optimizer.warmup", "-1"),
    (lambda: Optimizer(final=2.0), "optimizer.final", "2.0"),
    (lambda: Optimizer(b2=1.0), "optimizer.b2", "1.0"),
    (lambda: Optimizer(eps=0.0), "optimizer.eps", "0.0"),
    (lambda: FrontEnd(kind="pool"), "front_end.kind", "'pool' must be one of 'none', 'linear', "),
    (lambda: FrontEnd(kind="mlp"), "front_end.encoder", "mlp"),
    (lambda: FrontEnd(kind="merger", encoder="clip", init="lavit", tower=TOWER, tokens=17), "front_end.tokens", "17"),
    (lambda: Optimizer(weight_decay=-1.0), "optimizer.weight_decay", "-1.0"),
    (lambda: Optimizer(clip=-1.0), "optimizer.clip", "-1.0"),
    (lambda: Training(steps=0), "training.steps", "0"),
    (lambda: Training(batch_size=6, accumulate=4), "training.accumulate", "6"),
    (lambda: Training(sample_every=-1), "training.sample_every", "-1"),
    (lambda: Training(ema=1.0), "training.ema", "1.0"),
    (lambda: Training(watchdog=-1.0), "training.watchdog", "-1.0"),
    (lambda: Sampling(steps=0), "sampling.steps", "0"),
    (lambda: Mesh(fsdp=0), "mesh.fsdp", "0"),
    (lambda: Mesh(tensor=-1), "mesh.data and mesh.tensor", "-1"),
    (lambda: Config(mesh=Mesh(fsdp=3), model=Model(width=256)), "mesh.fsdp", "model.width=256"),
    (lambda: Config(mesh=Mesh(tensor=3), model=Model(block="attention")), "mesh.tensor", "heads"),
    (lambda: Sampling(sigma_min=100.0), "sampling.sigma_min", "100.0"),
    (lambda: Sampling(guidance=-1.0), "sampling.guidance", "-1.0"),
    (lambda: Config(model=Model(time_embedding="table")), "model.time_embedding", "diffusion.schedule='ddpm'"),
    (lambda: Config(data=Data(image_size=(30, 32))), "data.image_size", "28x32"),
    (lambda: Config(data=Data(source="shapes", generator_image_size=30)), "data.generator_image_size", "model.patch=4"),
    (lambda: Config(data=Data(source="probes", generator_image_size=66)), "data.generator_image_size", "model.patch=4"),
]
REMEDY = re.compile(r"must|raise|lower|change|use|set|needs|resize|not divisible", re.IGNORECASE)


@pytest.mark.parametrize(("make", "field", "value"), INVALID, ids=[f"{field}={value}" for _, field, value in INVALID])
def test_nonsense_is_refused_when_made_in_one_line_with_field_value_and_remedy(make, field, value):
    with pytest.raises(ConfigError) as refused:
        make()
    message = str(refused.value)
    assert field in message and value in message and REMEDY.search(message) and "\n" not in message


def test_tokenizers_of_the_table_above_can_be_made():
    """But for what is refused there; a decoder to pixels has its own way to denoise."""
    for network in set(TOKENIZERS) - {"conv_autoencoder"}:
        tokenizing(network)
    tokenizing("lavit", diffusion=Diffusion(shift=2.0, prediction="v"), sampling=Sampling(solver="ddim", steps=4))


def test_every_group_of_fields_is_covered_above():
    groups = {field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}
    assert {field.split(".")[0] for _, field, _ in INVALID} == groups


def test_tight_widths_warn():
    assert Model(width=192, patch=4).warnings() == []
    assert "leaves little room" in Model(width=64, patch=4).warnings()[0]
    assert "not lossless" in Model(width=40, patch=4, lossless=False).warnings()[0]


def test_field_names_are_dotted_and_complete():
    names = config_files.field_names(Config)
    assert {"name", "model.width", "training.log_every", "data.path"} <= set(names)
    assert len(names) == len(set(names)) and "model" not in names


# Experiment files.


@pytest.fixture
def experiment(tmp_path):
    def write(text: str):
        path = tmp_path / "tiny.py"
        path.write_text(text)
        return path

    return write


GOOD = "from mmdiff.config import *\ndef config():\n    return Config(model=Model(width=64))\n"


def test_an_experiment_may_have_several_configurations(experiment):
    path = experiment(GOOD + "def wide():\n    return Config(model=Model(width=128))\n")
    assert config_files.load_experiment(f"{path}:wide") == Config(model=Model(width=128))
    with pytest.raises(ConfigError, match=r"has no function `wade\(\) -> Config`; did you mean 'wide'\?"):
        config_files.load_experiment(f"{path}:wade")


def test_experiment_is_a_function(experiment):
    assert config_files.load_experiment(experiment(GOOD)) == Config(model=Model(width=64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"tiny\.py has no function `config\(\) -> Config`"),
        ("def config(:", r"tiny\.py:1: "),
        ("def config():\n    return 3", r"config\(\) returned int, not mmdiff\.config\.Config"),
        (GOOD.replace("width", "widht"), r"tiny\.py: .*unexpected keyword argument 'widht'"),
        (GOOD.replace("64", "7"), r"model\.width=7 cannot hold a 4x4 patch losslessly"),
    ],
)
def test_bad_experiments_are_one_line(experiment, text, message):
    with pytest.raises(ConfigError, match=message) as refused:
        config_files.load_experiment(experiment(text))
    assert "\n" not in str(refused.value)


def test_an_experiment_may_be_a_configuration_as_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(EVERYTHING.to_json())
    assert config_files.load_experiment(path) == EVERYTHING
    for text, message in (
        ("{", "not a configuration"),
        ("3", "not a configuration"),
        ('{"modle": {}}', "did you mean 'model'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json: .*{message}") as refused:
            config_files.load_experiment(path)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"no configuration file .*other\.json"):
        config_files.load_experiment(tmp_path / "other.json")


def test_a_missing_experiment_gets_a_suggestion(experiment):
    path = experiment(GOOD)
    with pytest.raises(ConfigError, match=r"no experiment file .*tinny\.py.*did you mean .*tiny\.py"):
        config_files.load_experiment(path.with_name("tinny.py"))


# The command line.


def test_any_field_can_be_overridden():
    several = ["--model.width", "512", "--training.steps=9", "--model.block", "attention"]
    cfg = override(Config(), [*several, "--data.image-size", "32", "48", "--data.flip"])
    assert (cfg.model.width, cfg.training.steps, cfg.model.block) == (512, 9, "attention")
    assert cfg.data.image_size == (32, 48) and cfg.data.flip
    assert override(cfg, ["--data.no-flip"]) == override(cfg, ["--data.flip", "--data.no-flip"])
    assert override(cfg, []) == cfg


def test_unknown_fields_are_found_before_anything_runs():
    assert unknown_field(["--model.width", "3", "--data.no-flip", "--data.image-size=3"]) is None
    assert unknown_field(["--model.widht", "3"]) == "unknown field 'model.widht'; did you mean 'model.width'?"


def test_options_may_be_written_either_way():
    assert take_option(["a", "--workdir", "w", "b"], "--workdir") == ("w", ["a", "b"])
    assert take_option(["--workdir=w", "b"], "--workdir") == ("w", ["b"])
    assert take_option(["b"], "--workdir") == (None, ["b"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage"),
        (["tarin"], 2, "unknown command 'tarin'; did you mean 'train'?"),
        (["train", "--model.width", "3"], 2, "the first argument is the experiment file"),
        (["train", "GOOD"], 2, "give --workdir"),
        (["train", "GOOD", "--workdir", "w", "--model.widht", "3"], 2, "did you mean 'model.width'?"),
        (["train", "GOOD", "--workdir", "w", "--model.width", "3"], 65, "model.width=3 cannot hold"),
        (["train", "GOOD", "--workdir", "w", "--data.source", "documents"], 65, "data.path is empty"),
        (["train", "missing.py", "--workdir", "w"], 65, "no experiment file 'missing.py'"),
    ],
    ids=["nothing", "command", "no file", "no workdir", "field", "value", "data", "file"],
)
def test_mistakes_exit_with_a_code_and_one_line(experiment, tmp_path, monkeypatch, capsys, arguments, code, message):
    path = experiment(GOOD)
    monkeypatch.chdir(tmp_path)
    assert command.main([str(path) if a == "GOOD" else a for a in arguments]) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and not shown.out
    assert code == 2 or len([line for line in shown.err.splitlines() if not line.startswith("warning:")]) == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("value", ["three", "mamba"])
def test_a_value_of_the_wrong_kind_is_a_usage_error(experiment, tmp_path, capsys, value):
    field = "--model.width" if value == "three" else "--model.block"
    assert command.main(["train", str(experiment(GOOD)), "--workdir", str(tmp_path / "w"), field, value]) == 2
    shown = capsys.readouterr()
    assert value in shown.err + shown.out and "Traceback" not in shown.err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["prepare", "--help"], ["--version"]])
def test_help_exits_with_0(capsys, arguments):
    assert command.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out and not shown.err
    assert arguments == ["--version"] or "mmdiff train" in shown.out


def test_python_dash_m_is_the_command(mmdiff_command):
    done = mmdiff_command("tarin")
    assert done.returncode == 2 and done.stderr == "mmdiff: unknown command 'tarin'; did you mean 'train'?\n"


def test_fields_are_replaced_by_dotted_names_all_at_once():
    # neither change would be allowed alone
    changed = config_files.replaced(Config(), {"model.time": "token", "layout.time_token": True, "data.image_size": [8, 8]})
    assert changed.model.time == "token" and changed.layout.time_token and changed.data.image_size == (8, 8)
    for name, hint in (("model.widht", "did you mean 'model.width'"), ("model", "unknown field"), ("model.width.x", "unknown")):
        with pytest.raises(ConfigError, match=hint):
            config_files.replaced(Config(), {name: 1})
    with pytest.raises(ConfigError, match="wrong type"):
        config_files.replaced(Config(), {"model.width": "wide"})
