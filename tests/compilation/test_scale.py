"""Graphs and models of real size: the passes stay linear, and a model of 27 billion parameters is
rewritten without its weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mhc_compile import passes
from mhc_compile.tools.bench.passes import measure

PASSES = str(Path(passes.__file__).parent)


def lines_run(call) -> int:
    """How many lines of the passes `call()` executes: the work, without a clock."""
    count, before = 0, sys.gettrace()

    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return line

    def enter(frame, event, argument):
        return line if frame.f_code.co_filename.startswith(PASSES) else None

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_the_work_of_the_passes_is_linear():
    sizes, lines = [], []
    for nodes in (200, 600):
        lines.append(lines_run(lambda nodes=nodes: sizes.append(measure(nodes, runs=1, memory=False).nodes)))
    assert lines[0] > 10 * sizes[0]  # it counts something
    assert lines[1] / sizes[1] < 1.05 * lines[0] / sizes[0]


def test_the_benchmark_of_the_passes_measures_what_it_says():
    one, two = measure(150, runs=1), measure(300, runs=1)
    assert abs(one.nodes - 150) < 60
    assert abs(two.nodes - 300) < 60
    assert two.sites > one.sites > 0
    assert min(one.normalize, one.plan, one.expand) > 0
    assert one.peak < two.peak


@pytest.mark.slow
def test_memory_of_the_passes_is_linear():
    small, large = measure(1_000, runs=1), measure(4_000, runs=1)
    assert large.peak / large.nodes < 1.5 * small.peak / small.nodes


@pytest.mark.slow
def test_a_27_billion_parameter_decoder_is_attached_and_rewritten_on_the_meta_device():
    """In a process of its own, so that its peak memory can be read.

    The time is reported, and not asserted.
    """
    script = """
        import json, resource, time, torch, transformers, mhc_compile

        start = time.perf_counter()
        config = transformers.LlamaConfig(
            hidden_size=5120, num_hidden_layers=80, num_attention_heads=40, num_key_value_heads=8, intermediate_size=17920,
            vocab_size=64000, use_cache=False,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        tokens = torch.zeros(1, 128, dtype=torch.long, device="meta")
        parameters = sum(p.numel() for p in model.parameters())
        attached = mhc_compile.attach(model, tokens)
        updates = []

        def inner(graph_module, inputs):
            updates.append(sum(n.target is torch.ops.mhc.update.default for n in graph_module.graph.nodes))
            return graph_module.forward

        torch.compile(model, backend="mhc", options={"inner_backend": inner})(tokens)
        print(json.dumps({
            "parameters": parameters, "attached": len(attached), "updates": updates, "seconds": time.perf_counter() - start,
            "meta": all(p.is_meta for p in model.parameters()), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    print(f"27 B on the meta device: {seen['seconds']:.0f} s, {seen['peak'] / 2**30:.2f} GiB")
    assert seen["parameters"] > 27e9
    assert seen["meta"]
    assert seen["attached"] == 160
    assert seen["updates"] == [160]
    assert seen["peak"] < 4 * 2**30
