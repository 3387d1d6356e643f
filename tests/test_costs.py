import functools
import sys

import pytest
import torch
from conftest import SENTENCES

from kdlib import backbones, costs, experiments
from kdlib.data import Dataset
from kdlib.experiments import Protocol


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="resident memory's peak is known on Linux")
def test_the_peak_is_what_was_held_for_a_moment():
    def call():
        return torch.ones(2**24).sum().item()  # 64 MiB, freed again

    said, peak = costs.peak_mb(call)
    assert said == 2**24 and 60 < peak < 80


def test_every_row_is_measured_and_set_beside_the_plain_ones(tiny_folder, monkeypatch):
    monkeypatch.setattr(backbones, "lstm", functools.partial(backbones.lstm, embedding=8, hidden=6))
    protocol = Protocol("tiny", tiny_folder, labelled=8, transfer=6, teacher_steps=2, batch_size=4, student="bilstm", quiz=3)
    parts = experiments.divide(Dataset("tiny", list(SENTENCES), list(SENTENCES[:4]), list(SENTENCES[:4])), protocol)
    rows = ("teacher", "posterior", "posterior, teacher read anew", "msd central, now and then")
    table = costs.of_updates(protocol, parts, rounds=1, rows=rows).set_index("row")
    assert tuple(table.index) == rows and set(rows) < set(costs.ROWS) and (table["ms_per_update_p50"] > 0).all()
    assert table["time over stored"]["posterior"] == 1 == table["time over read anew"]["posterior, teacher read anew"]
    for wrong in ({"rounds": 0}, {"rows": ("posterior",)}, {"rows": (*rows, "magic")}):
        with pytest.raises(ValueError, match="expected rows of"):
            costs.of_updates(protocol, parts, **wrong)
