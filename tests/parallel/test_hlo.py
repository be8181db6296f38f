"""Traffic of compiled programs: a program written by hand, a real one with loops, and the texts of other compilers."""

import json
import os
import subprocess
import sys

import pytest

from mmdiff.parallel import hlo

PROGRAM = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %g = bf16[64,4]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[2,8]<=[16], dimensions={0}
}

%inner_condition (p.1: (s32[], f32[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer_body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %loop = (s32[], f32[8,4]) while(%t), condition=%inner_condition, body=%inner_body
  %part = f32[2,4]{1,0} reduce-scatter(%y), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

%outer_condition (q.1: (s32[], f32[8,4])) -> pred[] {
  ROOT %c = pred[] custom-call(%q.1), custom_call_target="unknowable"
}

%start_of_gather (r: bf16[4]) -> bf16[16] {
  %g1 = bf16[16]{0} all-gather(%r), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%end_of_gather (s: bf16[4]) -> bf16[16] {
  %g2 = bf16[16]{0} all-gather(%s), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

ENTRY %main (z: f32[8,4]) -> f32[] {
  %loops = (s32[], f32[8,4]) while(%t0), condition=%outer_condition, body=%outer_body, backend_config={KNOWN}
  %one = bf16[16] fusion(%z), kind=kCustom, calls=%start_of_gather
  %two = bf16[16] fusion(%z), kind=kCustom, calls=%end_of_gather
  %r.s = (f32[10]{0}, f32[6]{0}) all-reduce-start(%u, %v), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  %r.d = (f32[10]{0}, f32[6]{0}) all-reduce-done(%r.s)
  %a.s = (f32[3]{0}, f32[12]{0}) all-gather-start(%w), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %p.s = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%w), channel_id=5, source_target_pairs={{0,1}}
}
"""
KNOWN = '{"known_trip_count":{"n":"3"}}'


def test_loops_are_multiplied_out_and_every_form_is_counted_by_hand():
    found = hlo.traffic(PROGRAM.replace("{KNOWN}", KNOWN))
    payload = {
        "all-gather": 3 * 5 * 64 * 4 * 2 + 16 * 2 + 12 * 4,
        "reduce-scatter": 3 * 2 * 4 * 4 * 4,
        "all-reduce": 16 * 4,
        "collective-permute": 7 * 4,
    }
    assert found.payload == payload
    ring = lambda n: (n - 1) / n
    sent = 3 * 5 * 512 * ring(8) + 32 * ring(4) + 48 * ring(4) + 3 * 128 * ring(4) + 2 * 64 * ring(4) + 28
    assert found.sent == pytest.approx(sent)
    assert found.loops_of_unknown_length == 0


def test_a_loop_of_unknown_length_is_reported_and_counts_once():
    found = hlo.traffic(PROGRAM.replace("{KNOWN}", "{}"))
    assert found.loops_of_unknown_length == 1
    assert found.payload["reduce-scatter"] == 128


@pytest.mark.parametrize(
    ("rest", "size"),
    [
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=3] {'a','c'}", 12),
    ],
)
def test_group_sizes(rest, size):
    assert hlo.group_size(rest) == size


REAL = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mmdiff.parallel import hlo
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
stored, whole = NamedSharding(mesh, P(None, "d")), NamedSharding(mesh, P())
def f(w, x):
    def layer(x, w):
        return x @ jax.lax.with_sharding_constraint(w, whole), None
    return jax.lax.scan(layer, x, w)[0]
w = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=stored)
x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("d")))
found = hlo.traffic(jax.jit(f).lower(w, x).compile().as_text())
print(json.dumps([found.payload, found.sent, found.loops_of_unknown_length]))
"""


def test_a_real_scan_over_stored_parameters():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    payload, sent, unknown = json.loads(done.stdout)
    size = 6 * 64 * 64 * 4
    assert payload == {"all-gather": size} and sent == size * 7 / 8 and unknown == 0
