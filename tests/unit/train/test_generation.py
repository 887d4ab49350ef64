"""What a model in training answers is what it would answer when it is served."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.data.packing import Sample
from burnish.data.question import Question
from burnish.train.build import build_model
from burnish.train.generation import greedy
from tests.conftest import write_model

CPU = torch.device("cpu")


def questions(*prompts: list[int]) -> list[Question]:
    return [Question("rows#0", np.array(prompt, np.int32), np.array([1], np.int32)) for prompt in prompts]


def test_a_question_ends_before_the_last_answer():
    trained = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0], bool)
    found = Question.of("rows#7", Sample(np.arange(11, dtype=np.int32), trained, (1, 3)))
    assert (found.row, found.prompt.tolist(), found.reference.tolist()) == ("rows#7", [*range(7)], [7, 8, 9])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_answers_are_those_of_plain_transformers_to_each_prompt_alone(make_recipe, tmp_path, architecture, lora):
    folder = write_model(tmp_path / "model", architecture)
    prompts = [[5, 6, 7], [*range(20, 60)], [9]]
    model = build_model(make_recipe(model={"path": str(folder)}, lora=lora), cuda=False).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()

    def alone(prompt: list[int], stop_ids: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        found = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=stop_ids
        )
        return found[0, len(prompt) :].tolist()

    free = greedy(model, questions(*prompts), frozenset(), 20, 128, CPU)
    assert free == [alone(prompt, [-1]) for prompt in prompts]
    assert [len(answer) for answer in free] == [20] * 3 and len({tuple(answer) for answer in free}) > 1
    stop = free[1][3]
    stopped = greedy(model, questions(*prompts), frozenset({stop}), 20, 128, CPU)
    assert stopped == [alone(prompt, [stop]) for prompt in prompts]
    assert stopped[1][-1] == stop and len(stopped[1]) <= 4, "with its stop token, and no further"
    assert greedy(model, [], frozenset({stop}), 20, 128, CPU) == []


def test_no_row_is_longer_than_a_pack_and_no_answer_than_what_fits(make_recipe, monkeypatch):
    model = build_model(make_recipe(), cuda=False).eval()
    prompts, capacity, widths, beats = [[5] * 20, [6] * 38, [7] * 8, [8] * 9, [9] * 40], 40, [], []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids, **more: widths.append(input_ids.shape[1]) or forward(input_ids, **more)
    )
    found = greedy(model, questions(*prompts), frozenset(), 10, capacity, CPU, lambda: beats.append(len(widths)))
    assert [len(answer) for answer in found] == [10, 2, 10, 10, 1], "one at least"
    assert max(widths) <= capacity and beats == [*range(len(widths))], "before each pass"
    alone = [greedy(model, questions(prompt), frozenset(), 10, 1024, CPU)[0] for prompt in prompts]
    assert found == [answer[: len(one)] for answer, one in zip(alone, found, strict=True)]
