"""Checkpoints: the same numbers after a restart, whole or not there, refused where they do not fit."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft import data, train
from jaxpeft.models import EncoderConfig, SequenceClassifier
from jaxpeft.train.checkpoints import CheckpointError, Checkpoints
from jaxpeft.train.loop import Fit, Interrupted, NonFiniteError, fit

CONFIG = EncoderConfig(vocab=50, width=8, layers=1, heads=2, head_dim=4, mlp_width=16, max_positions=16)


class World:
    def __init__(self, rank=2):
        rng = np.random.default_rng(0)
        tokens = data.Ragged.of([rng.integers(1, 50, n).tolist() for n in rng.integers(2, 8, 40)])
        self.batches = data.text_batches(tokens, rng.integers(0, 3, 40), batch_size=8, seed=3, buckets=(8,))
        model = SequenceClassifier(CONFIG, 3)
        batch = self.batches.batch(0)
        inputs = (batch.input_ids, batch.attention_mask)
        self.params = model.init(jax.random.key(0), *inputs)
        adapted = jaxpeft.adapt(model.apply, jaxpeft.chain(jaxpeft.lora(rank=rank, dropout=0.2), jaxpeft.head()))
        optimiser = optax.adam(1e-2)
        self.step = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))
        delta = adapted.init(jax.random.key(1), self.params, *inputs)
        self.start = lambda: train.create(delta, optimiser, seed=5)


@pytest.fixture(scope="module")
def world():
    return World()


def test_a_run_cut_in_two_ends_with_the_same_bits_as_one_run(world, tmp_path):
    whole = fit(world.step, world.start(), world.params, world.batches, 12)
    first = Checkpoints(tmp_path)
    fit(world.step, world.start(), world.params, world.batches, 7, Fit(checkpoints=first))
    first.close()
    second = Checkpoints(tmp_path)
    state = second.restore(world.start())
    assert int(state.step) == 7
    assert second.meta()["position"] == 7
    resumed = fit(world.step, state, world.params, world.batches, 12)
    chex.assert_trees_all_equal(whole, resumed)


def test_ctrl_c_finishes_the_step_saves_and_says_where(world, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    stop_at = 4

    def progress(step, rate, numbers):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    with pytest.raises(Interrupted, match="stopped after step"):
        fit(world.step, world.start(), world.params, world.batches, 50, Fit(checkpoints=checkpoints, progress=progress))
    step = checkpoints.latest()
    assert step in (stop_at, stop_at + 1)
    whole = fit(world.step, world.start(), world.params, world.batches, 9)
    resumed = fit(world.step, checkpoints.restore(world.start()), world.params, world.batches, 9)
    chex.assert_trees_all_equal(whole, resumed)


def test_nan_names_its_step_and_keeps_the_last_good_state(world, tmp_path):
    class Poisoned:
        process_count = 1

        def at(self, position):
            for i, batch in enumerate(world.batches.at(position), position):
                yield batch._replace(weight=batch.weight * np.nan) if i == 3 else batch

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        fit(world.step, world.start(), world.params, Poisoned(), 9, Fit(checkpoints=checkpoints))
    good = fit(world.step, world.start(), world.params, world.batches, 3)
    chex.assert_trees_all_equal(checkpoints.restore(world.start()).learned, good.learned)


def test_a_checkpoint_of_another_shape_is_refused_with_its_differences(world, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    fit(world.step, world.start(), world.params, world.batches, 1, Fit(checkpoints=checkpoints))
    with pytest.raises(CheckpointError, match=r"of another run: .*other shapes"):
        checkpoints.restore(World(rank=3).start())


def test_nothing_to_resume_is_said(world, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        Checkpoints(tmp_path).restore(world.start())


def test_a_save_that_was_killed_halfway_leaves_the_previous_one(world, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    fit(world.step, world.start(), world.params, world.batches, 2, Fit(checkpoints=checkpoints))
    checkpoints.close()
    whole = checkpoints.folder / "2"
    # What a killed process leaves: Orbax's temporary folder, not yet renamed, with part of the files.
    half = checkpoints.folder / "3.orbax-checkpoint-tmp-0"
    shutil.copytree(whole, half)
    next(f for f in half.rglob("*") if f.is_file()).unlink()
    again = Checkpoints(tmp_path)
    assert again.latest() == 2
    assert int(again.restore(world.start()).step) == 2


SAVING = """
import dataclasses
import sys
import jax.numpy as jnp
import optax
from jaxpeft import train
from jaxpeft.train.checkpoints import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
state = train.create({f"w{i}": jnp.zeros(200_000) for i in range(8)}, optax.sgd(0.1))
for step in range(1, 10_000):
    learned = {name: x * 0 + step for name, x in state.learned.items()}
    state = dataclasses.replace(state, step=state.step * 0 + step, learned=learned)
    checkpoints.save(state, {"position": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 at any moment, three times over: the newest checkpoint holds one step's values in every leaf."""
    like = train.create({f"w{i}": np.zeros(200_000, np.float32) for i in range(8)}, optax.sgd(0.1))
    for delay in (0.0, 0.021, 0.057):
        command = [sys.executable, "-c", SAVING, tmp_path / str(delay)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            done = [int(process.stdout.readline()) for _ in range(2)]
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            done += [int(line) for line in process.stdout.read().split()]
        checkpoints = Checkpoints(tmp_path / str(delay))
        state = checkpoints.restore(like)
        assert int(state.step) >= done[-1], "what was reported as saved is there"
        assert checkpoints.meta()["position"] == int(state.step)
        for name, x in state.learned.items():
            np.testing.assert_array_equal(x, float(state.step), err_msg=name)
        checkpoints.close()


def test_a_full_disk_leaves_the_previous_checkpoint(world, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    state = fit(world.step, world.start(), world.params, world.batches, 2, Fit(checkpoints=checkpoints))
    state = fit(world.step, state, world.params, world.batches, 3)
    monkeypatch.setattr(
        checkpoints._manager, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(state, {})
    assert int(Checkpoints(tmp_path).restore(world.start()).step) == 2


def test_outside_the_main_thread_training_needs_no_signal_handler(world):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(fit(world.step, world.start(), world.params, world.batches, 1))
    )
    thread.start()
    thread.join()
    assert int(done[0].step) == 1
