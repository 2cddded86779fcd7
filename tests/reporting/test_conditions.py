"""The machine that a measurement ran on."""

from __future__ import annotations

import os

import torch

from mhc_compile.reporting.conditions import available_cores, load_average, machine_conditions, processor_name


def test_conditions_of_this_process(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    found = machine_conditions("cpu")
    assert (found["device"], found["cores"]) == (processor_name(), available_cores())
    assert (found["threads"], found["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert found["wait_policy"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert machine_conditions("cpu")["wait_policy"] == "unset"
    assert 1 <= available_cores() <= os.cpu_count()


def test_load_average_is_zero_where_the_system_has_none(monkeypatch):
    assert load_average() >= 0
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert load_average() == 0.0
