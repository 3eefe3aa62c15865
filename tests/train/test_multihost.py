"""Four processes with `jax.distributed` on one machine give the numbers of one, over a checkpoint in the middle."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = """
import json, sys
import jax
port, rank, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", 8 // count)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, rank)
import numpy as np, optax, jaxpeft
from jaxpeft import data, train
from jaxpeft.models import EncoderConfig, SequenceClassifier

config = EncoderConfig(vocab=50, width=8, layers=1, heads=2, head_dim=4, mlp_width=16, max_positions=16)
rng = np.random.default_rng(0)
tokens = data.Ragged.of([rng.integers(1, 50, n).tolist() for n in rng.integers(2, 8, 40)])
batches = data.text_batches(tokens, rng.integers(0, 3, 40), batch_size=8, seed=3, buckets=(8,),
                            process_index=jax.process_index(), process_count=jax.process_count())
model = SequenceClassifier(config, 3)
ids = np.ones((2, 8), np.int32)
params = model.init(jax.random.key(0), ids, ids)
adapted = jaxpeft.adapt(model.apply, jaxpeft.chain(jaxpeft.lora(rank=2), jaxpeft.head()))
optimiser = optax.adam(1e-2)
delta = jax.jit(adapted.init)(jax.random.key(1), params, ids, ids)
mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
state = train.place_state(mesh, train.create(jax.device_get(delta), optimiser), params)
base = train.place_base(mesh, jax.device_get(params))
points = train.Checkpoints(folder)
step = jax.jit(train.make_step(adapted, train.text_classification(), optimiser))
losses = []
for position in range(6):
    if position == 3:
        points.save(state, {"position": position})
        state = points.restore(jax.tree.map(lambda x: x, state))
        assert points.meta()["position"] == 3
    state, numbers = step(state, base, train.place_batch(mesh, batches.batch(position)))
    losses.append(float(numbers["loss"]))
print(json.dumps(losses))
"""


@pytest.mark.slow
def test_four_processes_with_a_checkpoint_give_the_losses_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def run(count):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        env["PYTHONPATH"] = str(Path(__file__).parents[2])
        workers = [
            subprocess.Popen(
                [sys.executable, script, str(port), str(rank), str(count), tmp_path / f"{count}"],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        out = [w.communicate(timeout=300) for w in workers]
        assert all(w.returncode == 0 for w in workers), out
        return [json.loads(o.strip().splitlines()[-1]) for o, _ in out]

    (one,), several = run(1), run(4)
    for losses in several:
        np.testing.assert_array_equal(losses, several[0])
    np.testing.assert_allclose(one, several[0], rtol=1e-5)
