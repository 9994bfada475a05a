"""Score cards: what stands beside a score, by hand and for models whose behaviour is known."""
from __future__ import annotations

import json

import pytest
import torch

from ris_nb.cli.main import main
from ris_nb.contract import Output
from ris_nb.data.batches import ReferralDataset
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import SPECIAL
from ris_nb.data.writer import make_refshapes
from ris_nb.evaluation.evaluate import evaluate
from ris_nb.evaluation.floors import Floor
from ris_nb.evaluation.report import Record
from ris_nb.evaluation.scorecard import by_kind, card_markdown, none_settings, scorecard
from ris_nb.models.base import RISModel


class Sure(RISModel):
    """Marks everything, with a probability that falls with the length of the sentence; empties answers below `none`."""

    def __init__(self):
        super().__init__(64, [*SPECIAL])
        self.none = 0.25

    def forward(self, batch):
        return Output(torch.stack([torch.full((8, 8), 1 / len(text.split())).logit() for text in batch.expression]))

    def masks(self, output, sizes):
        return [torch.full(tuple(size), bool(p[0, 0].sigmoid() >= self.none)) for p, size in zip(output.score, sizes)]


@pytest.fixture(scope="module")
def plural(tmp_path_factory):
    root = tmp_path_factory.mktemp("plural")
    make_refshapes(root, "refshapes_plural", counts={"train": 2, "val": 12, "testA": 6})
    return open_data(root, "refshapes_plural")


def test_settings_of_none_trade_absent_things_for_sentences(plural):
    model = Sure()
    dataset = ReferralDataset(plural.referrals("val"), model.tokenizer, model.transform, every=True)
    rows = none_settings(model, dataset, (0.0, 0.3, 1.1))
    assert model.none == 0.25 and [*rows] == ["0.00", "0.30", "1.10"]
    assert (rows["0.00"]["N-acc"], rows["0.00"]["T-acc"]) == (0, 1) and (rows["1.10"]["N-acc"], rows["1.10"]["T-acc"], rows["1.10"]["mIoU"]) == (1, 0, 0)
    assert rows["0.00"]["mIoU"] > rows["0.30"]["mIoU"] > 0
    model.none = 0.3   # the setting itself, in place of what the table expects of it
    found = evaluate(model, dataset, progress=False).scores()
    assert (found["N-acc"], found["T-acc"]) == (rows["0.30"]["N-acc"], rows["0.30"]["T-acc"]) and 0 < found["T-acc"] < 1
    assert none_settings(Floor("nothing"), dataset) == {}


def test_a_card_leaves_out_train_and_counts_what_is_there(plural):
    card = scorecard(Floor("every object"), plural, seeds=(0, 1), checkpoint="all things")
    assert [*card["splits"]] == ["val", "testA"] and json.loads(json.dumps(card)) == card
    for split, found in card["splits"].items():
        sentences = [s for r in plural.referrals(split) for s in r.sentences]
        assert found["sentences"] + found["absent"]["sentences"] == len(sentences)
        assert found["mIoU"] == found["floors"]["every object"]["mIoU"] > found["floors"]["whole image"]["mIoU"]
        low, high = found["interval"]["mIoU"]
        assert low <= found["mIoU"] <= high and found["floors"]["nothing"]["mIoU"] == 0
        assert set(found["wrong"]["other photos"]["seeds"]) == {"0", "1"}
    assert "all things on refshapes_plural" in card_markdown(card) and "kind: none" not in card_markdown(card)


def test_a_sentence_of_two_kinds_counts_in_both():
    records = [Record(n, 0, n, "", kind, inside, 10, 0.1) for n, (kind, inside) in enumerate((("a+b", 4), ("a", 8), ("", 2)))]
    found = by_kind(records)
    assert {kind: (row["sentences"], row["mIoU"]) for kind, row in found.items()} == {
        "a": (2, pytest.approx(0.6)), "b": (1, pytest.approx(0.4)), "(none given)": (1, pytest.approx(0.2))}


def test_the_command_writes_a_card(plural, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    out = tmp_path / "cards" / "lavt.json"
    assert main(["evaluate", "--checkpoint", "lavt_tiny", "--root", str(plural.root), "--card", str(out)]) == 0
    card = json.loads(out.read_text())
    assert card["checkpoint"] == "lavt_tiny" and card["splits"]["val"]["wrong"]["other photos"]["mIoU"] < card["splits"]["val"]["mIoU"]
    assert "wrong sentences: other photos" in capsys.readouterr().out
