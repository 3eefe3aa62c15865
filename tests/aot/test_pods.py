"""The whole train step of a small decoder through the TPU's compiler: what the plan says adds up.

Needs the extra `aot`; nothing runs.
"""

import dataclasses
import functools
import json

import pytest

from jaxpeft import aot
from jaxpeft.models.presets import PRESETS
from jaxpeft.train.plan import PlanConfig, PlanError, plan

pytestmark = pytest.mark.aot
NARROW = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
NARROW |= {"num_key_value_heads": 4, "vocab_size": 1024}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow")
    (path / "config.json").write_text(json.dumps(PRESETS["llama-3-8b"] | NARROW))
    return path


@pytest.fixture(scope="module")
def made(folder):
    @functools.cache
    def make(**fields):
        return plan(PlanConfig(**{"model": str(folder), "pod": "v5e:2x2", "rows": 8, "length": 512, **fields}))

    return make


def test_the_bytes_of_a_lora_step_add_up(made):
    p = made()
    assert p.mesh == {"data": 1, "fsdp": 2, "tensor": 2}
    assert p.fits
    named = p.base + p.delta + p.optimiser + p.batch
    assert named <= p.arguments <= 1.1 * named + 2**16
    # Layers and tables: 2 (512 (512 + 256 + 256 + 512) + 3 512 1024) + 2 1024 512 weights of two bytes, a quarter each.
    divided = (2 * (512 * 1536 + 3 * 512 * 1024) + 2 * 1024 * 512) * 2 // 4
    assert divided <= p.base <= divided + 5 * 512 * 2
    assert abs(p.optimiser - 2 * p.delta) < 64  # counters
    assert p.total >= p.arguments + p.temporaries


def test_a_divided_base_is_gathered_in_every_layer_and_gradients_are_summed(made):
    found = made().collectives
    assert found["all-gather"].count >= 2 * 7  # forward and recomputed, each of a layer's products
    assert {"all-reduce", "reduce-scatter"} & set(found)
    assert made().cycles > 0


def test_what_full_fine_tuning_replaces_is_no_argument(made):
    p = made(method="full")
    assert p.base == 0
    assert p.delta == pytest.approx(2 * made().base, rel=0.01)  # float32
    assert p.arguments <= 1.1 * (p.delta + p.optimiser + p.batch) + 2**16


def test_a_program_that_does_not_fit_says_what_it_wanted(made):
    p = made(rows=4096, length=8192)
    assert not p.fits
    assert p.total > p.limit
    assert p.total == p.arguments + p.temporaries
    assert p.collectives == {}


def test_rows_and_axes_that_do_not_fit_the_slice_are_refused_before_any_compile(made):
    with pytest.raises(PlanError, match="7 rows do not divide over data x fsdp = 2 devices"):
        made(rows=7)
    with pytest.raises(PlanError, match="fsdp=3, tensor=2 make 6 devices; v5e:2x2 has 4"):
        made(fsdp=3, tensor=2)
    with pytest.raises(PlanError, match="5 runs do not divide over 2 groups"):
        made(runs=5, run_groups=2)
    with pytest.raises(aot.AotError, match="cannot compile for v5e 3x5x7"):
        made(pod="v5e:3x5x7", fsdp=105, tensor=1, rows=105)


def test_a_config_is_plain_data(made):
    assert json.loads(json.dumps(dataclasses.asdict(made())))["config"]["pod"] == "v5e:2x2"
