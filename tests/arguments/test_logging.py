"""The log of a run, and who writes it."""

import logging

import pytest
import torch
import transformers
from transformers import TrainerCallback

from hflit.arguments import Arguments, parse
from tests.reference import assert_same_run


@pytest.mark.parametrize("counted", ["all", "non_padding", True])
def test_tokens_are_counted_as_in_transformers(counted, theirs, mine):
    given = {"include_num_input_tokens_seen": counted, "eval_strategy": "epoch"}
    actual, expected = mine(**given), theirs(**given)
    assert_same_run(actual, expected)
    assert actual[0].num_input_tokens_seen == expected[0].num_input_tokens_seen > 0
    first, *_, last = actual[0].log_history
    assert 0 < first["num_input_tokens_seen"] < last["num_input_tokens_seen"]
    assert first["train_tokens_per_second"] > 0
    plain = mine(**given, parity=False)[0]
    if counted == "non_padding":
        assert plain.num_input_tokens_seen == expected[0].num_input_tokens_seen


class Levels(TrainerCallback):
    """Notes the level of transformers' logger at each update."""

    def __init__(self):
        self.seen = set()

    def on_step_end(self, args, state, control, **_):
        self.seen.add(logging.getLogger("transformers").level)


def test_log_level_holds_for_the_run(theirs, mine):
    logger = logging.getLogger("transformers")
    before = logger.level
    watches = Levels(), Levels()
    mine(log_level="error", callbacks=[watches[0]])
    assert logger.level == before
    try:
        theirs(log_level="error", callbacks=[watches[1]])
        assert logger.level == logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)
    assert watches[0].seen == watches[1].seen == {logging.ERROR}


@pytest.mark.parametrize(("each_node", "level"), [(True, logging.INFO), (False, logging.ERROR)])
def test_ranks_choose_the_level(each_node, level):
    given = {"log_level": "info", "log_level_replica": "error", "log_on_each_node": each_node}
    args = Arguments(**given)
    args.set_ranks(4, 2, 0)  # the first process of the second of two nodes
    assert args.get_process_log_level() == level
    args.set_ranks(4, 3, 1)
    assert args.get_process_log_level() == logging.ERROR


def test_entries_are_printed_without_a_bar(theirs, mine, capfd):
    for run in (theirs, mine):
        run(disable_tqdm=True)
        captured = capfd.readouterr()
        assert captured.out.count("'grad_norm'") == 4
        assert "%|" not in captured.err
        assert run(disable_tqdm=False)
        assert "'learning_rate'" not in capfd.readouterr().out or run is theirs


def test_cpu_is_used_where_there_is_more(monkeypatch):
    assert parse({"use_cpu": False})[1]["accelerator"] == "auto"
    args, flags = parse({"use_cpu": True})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert (args.device.type, flags["accelerator"]) == ("cpu", "cpu")
