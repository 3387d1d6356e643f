import sys

import pytest
import torch
from conftest import SENTENCES, tagger, tiny_study

from kdlib.lab import timing
from kdlib.methods import METHODS


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(),
    reason="resident memory's peak needs Linux",
)
def test_the_peak_is_what_was_held_for_a_moment():
    def call():
        return torch.ones(2**24).sum().item()  # 64 MiB, freed again

    said, peak = timing.peak_mb(call)
    assert said == 2**24 and 60 < peak < 80


def test_every_row_is_measured_and_set_beside_the_plain_ones(tiny_folder):
    study = tiny_study(tiny_folder)
    rows = {"teacher": None, "posterior": METHODS["posterior"]}
    rows["read anew"] = METHODS["msd"].tuned(every=0)
    rows["msd"] = METHODS["msd"].tuned(every=3)
    plain = {"stored": "posterior", "read anew": "read anew"}
    table = timing.of_updates(study, "bilstm", rows, plain, rounds=1).set_index("row")
    assert list(table.index) == list(rows) and (table["ms_per_update_p50"] > 0).all()
    assert table["time over stored"]["posterior"] == 1 == table["time over read anew"]["read anew"]
    for wrong in ({"rounds": 0}, {"plain": {"stored": "magic"}}):
        with pytest.raises(ValueError, match="expected a round or more and rows named"):
            timing.of_updates(study, "bilstm", rows, **({"plain": plain} | wrong))


def test_taggers_take_turns(tiny):
    models = {"teacher": tagger(tiny), "same": tagger(tiny)}
    table = timing.of_taggers(models, SENTENCES[:4], seconds=0.0, batches=(1, 4))
    assert list(table["model"]) == ["teacher", "same"] * 2 and (table["speedup"] > 0).all()
    with pytest.raises(ValueError, match="expected at least a batch of 32, got 4"):
        timing.of_taggers(models, SENTENCES[:4], 0.0, (32,))
