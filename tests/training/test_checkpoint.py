import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdiff.config import Optimizer
from mmdiff.training.checkpoint import CheckpointError, Checkpoints, restore_params
from mmdiff.training.optimizer import make_optimizer
from mmdiff.training.state import create, fingerprint, named_leaves

META = {"config": '{"name": "test"}', "data": "0123abcd", "vocabulary": "bytes"}


def make_state(step, width=32, seed=0):
    """Random leaves do not compress, so that a flipped bit lands in a value."""
    keys = jax.random.split(jax.random.key(seed + step), 3)

    def random(x):
        return jax.random.normal(keys[2], x.shape) if x.dtype == jnp.float32 else x

    params = {
        "blocks": {"in": {"kernel": jax.random.normal(keys[0], (3, 64, width)), "bias": jnp.zeros((3, width))}},
        "text_embedding": {"embedding": jax.random.normal(keys[1], (300, 64))},
    }
    tx, _ = make_optimizer(Optimizer(name="muon"), 10)
    state = create(params, tx, seed=5)
    ema = jax.tree.map(lambda p: p + 1, params)
    opt_state = jax.tree.map(random, state.opt_state)
    return dataclasses.replace(state, step=jnp.int32(step), ema=ema, opt_state=opt_state, skipped=jnp.int32(2))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(named_leaves(got).items(), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        assert checkpoints.save(step, make_state(step), META)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage, with steps 2 and 3."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def open_and_read(folder, like, **kwargs):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.latest_valid(like, **kwargs)
    finally:
        checkpoints.close()


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def test_round_trip_is_exact_and_keeps_the_newest(folder):
    got, meta = open_and_read(folder, abstract(make_state(0)))
    assert_same(got, make_state(3))
    assert jax.dtypes.issubdtype(got.key.dtype, jax.dtypes.prng_key)
    assert meta.items() >= META.items()
    assert (meta["format"], meta["step"]) == (1, 3)
    assert set(meta["versions"]) == {"jax", "flax", "mmdiff"}
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]
    with pytest.raises(AssertionError):
        assert_same(got, make_state(2))


def test_some_steps_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, keep_every=2)
    for step in range(1, 6):
        checkpoints.save(step, make_state(step), META)
    checkpoints.close()
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4, 5]
    params, _ = restore_params(tmp_path / "checkpoints", step=2)
    jax.tree.map(np.testing.assert_array_equal, params, make_state(2).ema)


def test_nothing_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_and_read("relative/checkpoints", make_state(0)) is None  # orbax alone refuses relative paths
    with pytest.raises(CheckpointError, match="no checkpoint in .*train first"):
        restore_params("elsewhere")


def test_a_step_is_saved_once_and_in_order(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(9, make_state(9), META)
    assert checkpoints.save(10, make_state(10), META)
    assert not checkpoints.save(10, make_state(10), META)
    with pytest.raises(CheckpointError, match="checkpoint 5 not written.*newer one, 10"):
        checkpoints.save(5, make_state(5), META)
    with pytest.raises(CheckpointError, match="checkpoint 20 would hold the state of step 19"):
        checkpoints.save(20, make_state(19), META)
    checkpoints.close()


DISK_FULL = """
import resource, sys
import jax, numpy as np
sys.path.insert(0, {tests!r})
from training.test_checkpoint import META, make_state
from mmdiff.training.checkpoint import Checkpoints, SaveError

checkpoints = Checkpoints({folder!r})
checkpoints.save(1, make_state(1), META)
checkpoints.wait()
# no file may grow any more: what a full disk does to a writer, without a disk to fill
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, make_state(2), META)
    checkpoints.wait()
    print("written")
except SaveError as error:
    print(error)
"""


def test_when_the_disk_is_full_the_checkpoint_before_stays_good_and_the_message_says_so(tmp_path):
    folder = tmp_path / "checkpoints"
    code = DISK_FULL.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert re.match(r".* could not be written to .*checkpoint 1 is whole, and the same command resumes from it", line), line
    got, _ = open_and_read(folder, make_state(0))
    assert_same(got, make_state(1))


def test_donation_right_after_an_asynchronous_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(4)
    want = jax.tree.map(np.asarray, state.params)
    checkpoints.save(4, state, META)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state.params)
    got, _ = checkpoints.latest_valid(abstract(make_state(0)))
    checkpoints.close()
    assert_same(got.params, want)


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage_meta(folder):
    (folder / "meta" / "metadata").write_text('{"format": 1, "st')


def edited_meta(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace("bytes", "bytez"))


DAMAGE = {
    "bit in params": (lambda f: flip(largest(f / "params")), "leaf params/.*fingerprint differs"),
    "bit in ema": (lambda f: flip(largest(f / "ema"), 0.2), "leaf ema/.*fingerprint differs"),
    "bit in the rest": (lambda f: flip(largest(f / "rest")), "leaf opt_state/.*fingerprint differs"),
    "truncated": (lambda f: truncate(f / "params"), ""),
    "item missing": (lambda f: shutil.rmtree(f / "ema"), ""),
    "meta missing": (lambda f: shutil.rmtree(f / "meta"), "meta: "),
    "meta cut short": (garbage_meta, "meta: "),
    "meta edited": (edited_meta, "meta: digest differs"),
    "empty": (lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()], "meta: "),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax, of a truncated array
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_loudly_and_training_goes_on(folder, capfd, kind):
    damage, reason = DAMAGE[kind]
    damage(folder / "3")
    like = abstract(make_state(0))
    with pytest.raises(CheckpointError, match=rf"checkpoint 3 in .* is damaged \({reason}"):
        open_and_read(folder, like, strict=True)
    capfd.readouterr()
    params, _ = restore_params(folder)  # reading for sampling does not touch the folder
    assert (folder / "3").exists()
    if kind not in ("bit in params", "bit in the rest", "truncated"):
        assert_same(params, make_state(2).ema)
        assert "checkpoint 3 is damaged" in capfd.readouterr().err
    capfd.readouterr()
    checkpoints = Checkpoints(folder)
    got, meta = checkpoints.latest_valid(like)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("checkpoint 3 is damaged (")
    assert line.endswith("; using 2")
    assert_same(got, make_state(2))
    assert meta["step"] == 2
    assert (folder / "3.damaged").exists()
    assert checkpoints.save(3, make_state(3), META)  # the run comes past step 3 again
    assert_same(checkpoints.latest_valid(like)[0], make_state(3))
    checkpoints.close()


def test_all_damaged_is_an_error_never_a_silent_restart(folder):
    for step in ("2", "3"):
        flip(largest(folder / step / "params"))
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(3: leaf .*; 2: leaf .*remove"):
        open_and_read(folder, make_state(0))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_half_written_directories_are_ignored_and_removed(folder):
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "4.orbax-checkpoint-tmp" / "garbage").write_bytes(b"\0" * 100)
    restore_params(folder)
    assert_same(open_and_read(folder, make_state(0))[0], make_state(3))
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_another_model_is_an_error_not_damage(folder, capfd):
    state = make_state(0)
    cast = dataclasses.replace(state, params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params))
    more = dataclasses.replace(state, params=state.params | {"new": {"scale": jnp.ones(3)}})
    less = dataclasses.replace(state, params={"blocks": state.params["blocks"]})
    rbg = dataclasses.replace(state, key=jax.random.key(0, impl="rbg"))
    for like, message in (
        (make_state(0, width=48), r"leaf params/blocks/in/bias: float32 \[3, 32\] there, float32 \[3, 48\] here"),
        (cast, r"leaf params/blocks/in/bias: float32 \[3, 32\] there, bfloat16 \[3, 32\] here"),
        (more, "has no leaf params/new/scale"),
        (less, "has a leaf params/text_embedding/embedding that is not here"),
        (rbg, r"leaf key: key<fry> \[\] there, key<rbg> \[\] here"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_and_read(folder, like)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]
    assert capfd.readouterr().err == ""


def test_params_alone_need_no_template(folder):
    for ema in (True, False):
        params, meta = restore_params(folder, ema=ema)
        assert_same(params, make_state(3).ema if ema else make_state(3).params)
        assert meta["config"] == META["config"]
    shutil.rmtree(folder / "3" / "rest")  # neither the optimiser nor the other copy is read
    shutil.rmtree(folder / "3" / "params")
    assert_same(restore_params(folder)[0], make_state(3).ema)
    flip(largest(folder / "3" / "ema"))
    with pytest.raises(CheckpointError, match=r"checkpoint 3 in .* \(leaf ema/.*fingerprint differs"):
        restore_params(folder, strict=True)
    assert_same(restore_params(folder)[0], make_state(2).ema)


def test_fingerprints_see_one_bit_of_any_type():
    arrays = [
        jax.random.normal(jax.random.key(0), (3, 5, 7)),
        jax.random.normal(jax.random.key(0), (9, 4)).astype(jnp.bfloat16),
        jnp.arange(-5, 6, dtype=jnp.int32),
        jnp.arange(6, dtype=jnp.uint32),
        jnp.array([True, False, True]),
        jnp.int32(3),
        np.arange(3, dtype=np.uint8),
    ]
    for x in arrays:
        words = np.array(x).reshape(-1)
        for index in {0, words.size // 2, words.size - 1}:
            changed = words.copy()
            changed.view(np.uint8)[index * words.itemsize] ^= 1
            assert fingerprint(changed.reshape(np.shape(x))) != fingerprint(x)
    x = arrays[0]
    assert len({fingerprint(y) for y in (x, -x, x[::-1], x.reshape(7, 5, 3), jnp.zeros_like(x))}) == 4  # reshaped: equal
    assert fingerprint(jax.random.key(1)) != fingerprint(jax.random.key(2))


KILLED = """
import sys
sys.path.insert(0, {here!r})
import jax, jax.numpy as jnp
from test_checkpoint import META, big_state
from mmdiff.training.checkpoint import Checkpoints
checkpoints = Checkpoints({folder!r})
for step in range(1, 1000):
    checkpoints.save(step, big_state(step), META)
    print(step, checkpoints.steps(), flush=True)
"""


def big_state(step):
    return {"params": {"w": jax.random.normal(jax.random.key(step), (2_000_000,))}, "ema": {"w": jnp.ones(3)}}


@pytest.mark.parametrize("kill_after", [2, 5])
def test_a_kill_in_the_middle_of_a_save_leaves_an_earlier_one(tmp_path, kill_after, capfd):
    script = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path / "checkpoints"))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith(f"{kill_after} "):  # the save of this step was started, an instant ago
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    state, meta = open_and_read(tmp_path / "checkpoints", big_state(0))
    assert meta["step"] in range(kill_after - 1, kill_after + 2)
    assert_same(state, big_state(meta["step"]))
    assert "damaged" not in capfd.readouterr().err


SHARDED = """
import sys
sys.path.insert(0, {here!r})
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from test_checkpoint import META, assert_same, make_state
from mmdiff.training.checkpoint import Checkpoints
from mmdiff.training.state import fingerprint
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "data") if x.ndim >= 2 else jax.P()))
sharded = jax.tree.map(put, make_state(3))
assert len({{str(s.index) for s in sharded.params["blocks"]["in"]["kernel"].addressable_shards}}) == 4
assert [fingerprint(x) for x in jax.tree.leaves(sharded)] == [fingerprint(x) for x in jax.tree.leaves(make_state(3))]
checkpoints = Checkpoints({folder!r})
got, _ = checkpoints.latest_valid(sharded)            # written on one device
assert_same(got, make_state(3))
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(sharded), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
import dataclasses
checkpoints.save(4, dataclasses.replace(sharded, step=put(jnp.int32(4))), META)
checkpoints.close()
"""


def test_any_sharding_reads_any_other(folder):
    script = SHARDED.format(here=str(Path(__file__).parent), folder=str(folder))
    subprocess.run([sys.executable, "-c", script], check=True)
    got, _ = open_and_read(folder, make_state(0))
    assert_same(got, dataclasses.replace(make_state(3), step=jnp.int32(4)))
    assert_same(restore_params(folder)[0], make_state(3).ema)


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr("mmdiff.training.checkpoint.FORMAT", 0)
    with pytest.raises(CheckpointError, match="checkpoint 3 has format 1, newer than this version's 0"):
        restore_params(folder)
    assert json.loads((folder / "3" / "meta" / "metadata").read_text())["format"] == 1
