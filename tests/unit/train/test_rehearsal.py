"""How long a run will compute, from steps of one and two layers."""

import numpy as np
import pytest
from transformers import Gemma3TextConfig

from burnish.train import rehearsal
from burnish.train.architecture import pack_cost
from burnish.train.rehearsal import rehearse


def test_what_a_second_layer_adds_counts_for_each_of_the_others(make_recipe, monkeypatch):
    seen = []

    def seconds(recipe, config, device):
        seen.append(config.num_hidden_layers)
        return {1: 3.0, 2: 5.0}[config.num_hidden_layers]

    monkeypatch.setattr(rehearsal, "_seconds", seconds)
    monkeypatch.setattr(rehearsal, "configuration", lambda recipe: Gemma3TextConfig(num_hidden_layers=12))
    recipe = make_recipe(data={"max_length": 64}, engine={"zero_stage": "auto"}, model={"activation_checkpointing": "auto"})
    found = rehearse(recipe, cuda=False, num_workers=1, local_workers=1)
    lengths = np.full(4, 16, np.int32)
    assert seen == [1, 2]
    assert found.flops_per_second == pytest.approx(float(pack_cost(recipe).of(lengths, np.array([0, 4]))[0]) / (3 + 11 * 2))
    assert (found.device, found.recipe.engine.stage(), found.recipe.model.recomputes()) == ("CPU", 2, False)
    assert found.needed.total < found.room.device and found.room.host is None


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_steps_are_timed_on_the_device(make_recipe, lora):
    assert rehearse(make_recipe(lora=lora), cuda=False, num_workers=2, local_workers=2).flops_per_second > 0


def test_layers_are_left_out_from_the_end():
    config = Gemma3TextConfig(num_hidden_layers=12)
    assert config.layer_types[5] == "full_attention"
    short = rehearsal._with_layers(config, 2)
    assert (short.num_hidden_layers, short.layer_types) == (2, config.layer_types[:2])
    assert (config.num_hidden_layers, len(config.layer_types)) == (12, 12)


def test_what_cannot_be_told_is_not_told(make_recipe, monkeypatch, caplog):
    assert rehearse(make_recipe(lora={"rank": 2}, model={"quantize": "nf4"}), False, 1, 1).flops_per_second is None
    monkeypatch.setattr(rehearsal, "_MOST_FLOPS", 1.0)
    assert rehearse(make_recipe(), False, 1, 1).flops_per_second is None, "it would take a CPU minutes"
    monkeypatch.undo()
    monkeypatch.setattr(rehearsal, "_seconds", lambda *_: 1 / 0)
    assert rehearse(make_recipe(), False, 1, 1).flops_per_second is None and "division by zero" in caplog.text
